// Rows of a prompt: rounded to bfloat16 and multiplied by weights rounded to bfloat16, in AMX tiles. There are as many
// rows as a weight widened once pays for, and no scale is applied to a product. A row's sum is the tiles' chain over its
// inputs in their order, so its bits depend on the row and the weight alone.
#pragma once

#include "amx.h"
#include "linear_block.h"

namespace {

constexpr int kPanel = 2;              // blocks of outputs that share a tile of rows
constexpr int kPanelGroups = 18;       // that are widened at a time: 36 KB stay in L1
constexpr int kRowsAtOnce = 512;       // that share a widened panel: their inputs stay in L2
constexpr int kTileBytes16 = 1024;     // 16 rows of a group of inputs, or its weights for 16 outputs
constexpr int kTileFloats = kTileRows * kBlockOutputs;

struct alignas(64) PanelScratch {
  uint8_t weights[kPanel][kPanelGroups][kTileBytes16];
  float sums[kRowsAtOnce / kTileRows][kPanel][kTileFloats];
};

// The tile of group `g` of rows [16 t, 16 t + 16).
inline uint8_t* row_tile(const LinearParams& p, int64_t t, int64_t g) {
  return reinterpret_cast<uint8_t*>(p.x) + (t * p.weight.groups + g) * kTileBytes16;
}

template <typename T>
void narrow_row(const LinearParams& p, int64_t row) {
  const T* from = static_cast<const T*>(p.input) + row * p.input_stride;
  for (int64_t g = 0; g < p.weight.groups; ++g, from += kGroup) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(load_wide(from + kLanes), load_wide(from));
    memcpy(row_tile(p, row / kTileRows, g) + row % kTileRows * kGroupBytes, &pair, sizeof pair);
  }
}

// Codes of 4 bits stand for scale * code + min, of 8 bits for scale * (code - 128). A code in the mantissa of kOne reads
// kOne + code, exactly; so a weight is one fused multiply-add with the scale and the minimum less kOne scales.
template <int kBits>
struct Widened {
  static constexpr int kShift = kBits == 4 ? 19 : 15;  // of the code in the mantissa
  static constexpr float kOne = kBits == 4 ? 16 : 256;
  __m512 scale, base;

  Widened(const PackedWeight& weight, int64_t at)
      : scale(load_scale(weight, at)), base(load_min<kBits>(weight, at) - kOne * scale) {}

  // The code at bit kFrom of every lane.
  template <int kFrom>
  __m512 weight(__m512i codes) const {
    constexpr int kMask = ((1 << kBits) - 1) << kShift, kAnd = 0xf0, kB = 0xcc, kC = 0xaa;
    const __m512i placed = kFrom < kShift ? _mm512_slli_epi32(codes, kShift > kFrom ? kShift - kFrom : 0)
                                          : _mm512_srli_epi32(codes, kFrom > kShift ? kFrom - kShift : 0);
    const __m512i one = (__m512i)_mm512_set1_ps(kOne), mask = _mm512_set1_epi32(kMask);
    const __m512 raised = (__m512)_mm512_ternarylogic_epi32(placed, mask, one, (kAnd & kB) | kC);
    return _mm512_fmadd_ps(raised, scale, base);
  }

  // Two neighbouring inputs, at bits kFrom and kFrom + 8, as pairs of every output.
  template <int kFrom>
  void store_pair(__m512i codes, uint8_t* to) const {
    const __m512i kInterleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512bh both = _mm512_cvtne2ps_pbh(weight<kFrom + 8>(codes), weight<kFrom>(codes));
    _mm512_store_si512(to, _mm512_permutexvar_epi16(kInterleave, (__m512i)both));
  }

  // Four neighbouring inputs.
  template <int kFrom>
  void store_quad(__m512i codes, uint8_t* to) const {
    store_pair<kFrom>(codes, to);
    store_pair<kFrom + 16>(codes, to + kQuadBytes);
  }
};

template <int kBits>
void widen(const PackedWeight& weight, int64_t block, int64_t begin, int64_t end, uint8_t (*tiles)[kTileBytes16]) {
  for (int64_t g = begin; g < end; ++g) {
    const int64_t group = block * weight.groups + g;
    const uint8_t* codes = weight.codes + group * kCodeBytes<kBits>;
    uint8_t* tile = tiles[g - begin];
    prefetch<kBits>(codes);
    const Widened<kBits> widened(weight, group * kBlockOutputs);
    for (int q = 0; q < kQuads * kBits / 8; ++q, tile += 2 * kQuadBytes) {
      const __m512i packed = _mm512_loadu_si512(codes + q * kQuadBytes);
      widened.template store_quad<0>(packed, tile);
      if constexpr (kBits == 4) widened.template store_quad<4>(packed, tile + kTileBytes16 / 2);
    }
  }
}

template <int kSum, int kX, int kWeights>
inline void multiply_bf16_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kWeights));
}

// Sums 0 and 1 of one tile of rows, 2 and 3 of the next.
template <int kTiles>
inline void load_sums(const float (*sums)[kPanel][kTileFloats], bool is_first) {
  if (is_first) {
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (kTiles == 2) zero_tile<2>();
    if constexpr (kTiles == 2) zero_tile<3>();
  } else {
    load_tile<0>(sums[0][0], kQuadBytes);
    load_tile<1>(sums[0][1], kQuadBytes);
    if constexpr (kTiles == 2) load_tile<2>(sums[1][0], kQuadBytes);
    if constexpr (kTiles == 2) load_tile<3>(sums[1][1], kQuadBytes);
  }
}

template <int kTiles>
inline void store_sums(float (*sums)[kPanel][kTileFloats]) {
  store_tile<0>(sums[0][0], kQuadBytes);
  store_tile<1>(sums[0][1], kQuadBytes);
  if constexpr (kTiles == 2) store_tile<2>(sums[1][0], kQuadBytes);
  if constexpr (kTiles == 2) store_tile<3>(sums[1][1], kQuadBytes);
}

// One or two tiles of rows, `stride` bytes apart, by both blocks.
template <int kTiles>
inline void multiply_panel(const uint8_t* x, int64_t stride, int64_t groups, const PanelScratch& scratch) {
  for (int64_t g = 0; g < groups; ++g, x += kTileBytes16) {
    load_tile<4>(x, kGroupBytes);
    load_tile<6>(scratch.weights[0][g], kQuadBytes);
    load_tile<7>(scratch.weights[1][g], kQuadBytes);
    multiply_bf16_tiles<0, 4, 6>();
    multiply_bf16_tiles<1, 4, 7>();
    if constexpr (kTiles == 2) {
      load_tile<5>(x + stride, kGroupBytes);
      multiply_bf16_tiles<2, 5, 6>();
      multiply_bf16_tiles<3, 5, 7>();
    }
  }
}

// A block of the first half of the outputs and its partner of the second, into the tile `t` of the rows that follow.
inline void write_gated(const LinearParams& p, int64_t block, int64_t t, const float* gate, const float* up) {
  const int64_t groups = p.outputs / 2 / kGroup;
  int8_t* to = p.gated + (t * groups + block / 2) * kTileBytes16 + block % 2 * (kGroupBytes / 2);
  for (int r = 0; r < kTileRows; ++r, to += kGroupBytes, gate += kBlockOutputs, up += kBlockOutputs) {
    const __m256bh narrow = _mm512_cvtneps_pbh(silu(load(gate)) * load(up));
    memcpy(to, &narrow, sizeof narrow);
  }
}

inline void write_panel(const LinearParams& p, const int64_t (&blocks)[kPanel], int64_t t,
                        const float (&sums)[kPanel][kTileFloats]) {
  if (p.gated != nullptr) return write_gated(p, blocks[0], t, sums[0], sums[1]);
  const int64_t row = t * kTileRows, left = p.rows - row;
  for (int half = 0; half < kPanel; ++half)
    write(p, blocks[half], row, static_cast<int>(left < kTileRows ? left : kTileRows), sums[half]);
}

// Two blocks of outputs for the tiles of rows [begin, end).
template <int kBits>
void run_panel(const LinearParams& p, const int64_t (&blocks)[kPanel], int64_t begin, int64_t end,
               PanelScratch& scratch) {
  const int64_t groups = p.weight.groups, parts = (groups + kPanelGroups - 1) / kPanelGroups;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = groups * part / parts, last = groups * (part + 1) / parts;
    for (int half = 0; half < kPanel; ++half) widen<kBits>(p.weight, blocks[half], first, last, scratch.weights[half]);
    for (int64_t tile = begin; tile < end; tile += 2) {
      const uint8_t* x = row_tile(p, tile, first);
      float(*sums)[kPanel][kTileFloats] = scratch.sums + (parts == 1 ? 0 : tile - begin);
      if (tile + 1 < end) {
        load_sums<2>(sums, part == 0);
        multiply_panel<2>(x, groups * kTileBytes16, last - first, scratch);
        store_sums<2>(sums);
      } else {
        load_sums<1>(sums, part == 0);
        multiply_panel<1>(x, 0, last - first, scratch);
        store_sums<1>(sums);
      }
      if (part + 1 < parts) continue;
      for (int64_t t = tile; t < tile + 2 && t < end; ++t) write_panel(p, blocks, t, sums[t - tile]);
    }
  }
}

template <int kBits>
void run_panels(const LinearParams& p, int64_t begin, int64_t end) {
  TileShape shapes[8];
  for (TileShape& shape : shapes) shape = {kTileRows, kGroupBytes};
  configure_tiles(shapes);
  PanelScratch scratch;
  constexpr int64_t kTilesAtOnce = kRowsAtOnce / kTileRows;
  const int64_t tiles = pagestream::whole_tiles(p.rows) / kTileRows, half = p.outputs / kBlockOutputs / 2;
  for (int64_t tile = 0; tile < tiles; tile += kTilesAtOnce) {
    const int64_t last = tile + kTilesAtOnce < tiles ? tile + kTilesAtOnce : tiles;
    for (int64_t block = begin; block < end; block += kPanel) {
      const int64_t next = block + 1 < end ? block + 1 : block;  // the last of an odd number is its own partner
      if (p.gated != nullptr)
        run_panel<kBits>(p, {block / 2, block / 2 + half}, tile, last, scratch);
      else
        run_panel<kBits>(p, {block, next}, tile, last, scratch);
    }
  }
  _tile_release();
}

}  // namespace
