// Rows of a prompt: rounded to bfloat16 and multiplied by weights rounded to bfloat16, in AMX tiles. There are as many
// rows as a weight widened once pays for, and no scale is applied to a product. A row's sum is the tiles' chain over its
// inputs in their order, so its bits depend on the row and the weight alone.
#pragma once

#include "amx.h"
#include "linear_block.h"

namespace {

constexpr int kPanel = 2;              // blocks of outputs that share a tile of rows
constexpr int kPanelGroups = 9;        // that are widened at a time: 18 KB stay in L1, beside those widened next
constexpr int kRowsAtOnce = 512;       // that share a widened panel: their inputs stay in L2
constexpr int kTileBytes16 = 1024;     // 16 rows of a group of inputs, or its weights for 16 outputs
constexpr int kTileFloats = kTileRows * kBlockOutputs;

// Weights as tiles: of two blocks and some groups.
using Panel = uint8_t[kPanel][kPanelGroups][kTileBytes16];

struct alignas(64) PanelScratch {
  Panel weights[2];  // one is multiplied, the next one is widened meanwhile
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
class Widened {
 public:
  Widened(const PackedWeight& weight, int64_t at) {
    const __m512 scale = load_scale(weight, at), base = load_min<kBits>(weight, at) - kOne * scale;
    for (int half = 0; half < 2; ++half) {
      scale_[half] = _mm512_permutexvar_ps(twice(half), scale);
      base_[half] = _mm512_permutexvar_ps(twice(half), base);
    }
  }

  // Four neighbouring inputs, at bits kFrom, kFrom + 8, ..., as pairs of every output.
  template <int kFrom>
  void store_quad(__m512i codes, uint8_t* to) const {
    const __m512i first = _mm512_permutexvar_epi32(twice(0), codes), last = _mm512_permutexvar_epi32(twice(1), codes);
    store_pair<kFrom>(first, last, to);
    store_pair<kFrom + 16>(first, last, to + kQuadBytes);
  }

 private:
  static constexpr int kShift = kBits == 4 ? 19 : 15;  // of the code in the mantissa
  static constexpr float kOne = kBits == 4 ? 16 : 256;

  // Outputs [8 half, 8 half + 8), each in two neighbouring lanes: for a pair of inputs.
  static __m512i twice(int half) {
    const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return half == 0 ? first : _mm512_add_epi32(first, _mm512_set1_epi32(8));
  }

  // The codes at bit kFrom of even lanes and kFrom + 8 of odd ones.
  template <int kFrom>
  __m512 weights(__m512i codes, int half) const {
    constexpr int kMask = ((1 << kBits) - 1) << kShift, kAnd = 0xf0, kB = 0xcc, kC = 0xaa;
    constexpr int kEven = (kShift - kFrom + 32) % 32, kOdd = (kShift - kFrom + 24) % 32;
    const __m512i turns = _mm512_set1_epi64(int64_t{kOdd} << 32 | kEven);
    const __m512i one = (__m512i)_mm512_set1_ps(kOne), mask = _mm512_set1_epi32(kMask);
    const __m512i placed = _mm512_rolv_epi32(codes, turns);
    const __m512 raised = (__m512)_mm512_ternarylogic_epi32(placed, mask, one, (kAnd & kB) | kC);
    return _mm512_fmadd_ps(raised, scale_[half], base_[half]);
  }

  template <int kFrom>
  void store_pair(__m512i first, __m512i last, uint8_t* to) const {
    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(weights<kFrom>(last, 1), weights<kFrom>(first, 0)));
  }

  __m512 scale_[2], base_[2];
};

// Two blocks of outputs, and of their inputs the groups [begin, end).
struct PanelPart {
  int64_t blocks[kPanel];
  int64_t begin, end;
};

template <int kBits>
void widen(const PackedWeight& weight, int64_t group, uint8_t* tile) {
  const uint8_t* codes = weight.codes + group * kCodeBytes<kBits>;
  prefetch<kBits>(codes);
  const Widened<kBits> widened(weight, group * kBlockOutputs);
  for (int q = 0; q < kQuads * kBits / 8; ++q, tile += 2 * kQuadBytes) {
    const __m512i packed = _mm512_loadu_si512(codes + q * kQuadBytes);
    widened.template store_quad<0>(packed, tile);
    if constexpr (kBits == 4) widened.template store_quad<4>(packed, tile + kTileBytes16 / 2);
  }
}

// Widens a part tile by tile, between products with another one: vectors and tiles compute side by side.
template <int kBits>
class Widener {
 public:
  Widener(const PackedWeight& weight, const PanelPart& part, Panel& panel)
      : weight_(weight), part_(part), panel_(panel), groups_(part.end - part.begin) {}

  int64_t left() const { return (kPanel - half_) * groups_ - group_; }

  void run(int64_t tiles) {
    for (tiles = tiles < left() ? tiles : left(); tiles > 0; --tiles) {
      widen<kBits>(weight_, part_.blocks[half_] * weight_.groups + part_.begin + group_, panel_[half_][group_]);
      if (++group_ < groups_) continue;
      group_ = 0;
      ++half_;
    }
  }

 private:
  const PackedWeight& weight_;
  const PanelPart part_;
  Panel& panel_;
  const int64_t groups_;
  int64_t half_ = 0, group_ = 0;  // the tile that is widened next
};

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

// One or two tiles of rows, `stride` bytes apart, by both blocks; after each group, `tiles` of the next part are widened.
template <int kTiles, int kBits>
inline void multiply_panel(const uint8_t* x, int64_t stride, int64_t groups, const Panel& panel, int64_t tiles,
                           Widener<kBits>& next) {
  for (int64_t g = 0; g < groups; ++g, x += kTileBytes16) {
    load_tile<4>(x, kGroupBytes);
    load_tile<6>(panel[0][g], kQuadBytes);
    load_tile<7>(panel[1][g], kQuadBytes);
    multiply_bf16_tiles<0, 4, 6>();
    multiply_bf16_tiles<1, 4, 7>();
    if constexpr (kTiles == 2) {
      load_tile<5>(x + stride, kGroupBytes);
      multiply_bf16_tiles<2, 5, 6>();
      multiply_bf16_tiles<3, 5, 7>();
    }
    next.run(tiles);
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

// A part by the tiles of rows [begin, end), while the next one is widened.
template <int kBits>
void run_part(const LinearParams& p, const PanelPart& part, int64_t begin, int64_t end, const Panel& panel,
              PanelScratch& scratch, Widener<kBits>& next) {
  const int64_t groups = p.weight.groups, count = part.end - part.begin;
  const bool is_first = part.begin == 0, is_last = part.end == groups;
  const int64_t steps = (end - begin + 1) / 2 * count, tiles = (next.left() + steps - 1) / steps;
  for (int64_t tile = begin; tile < end; tile += 2) {
    const uint8_t* x = row_tile(p, tile, part.begin);
    float(*sums)[kPanel][kTileFloats] = scratch.sums + (is_first && is_last ? 0 : tile - begin);
    if (tile + 1 < end) {
      load_sums<2>(sums, is_first);
      multiply_panel<2>(x, groups * kTileBytes16, count, panel, tiles, next);
      store_sums<2>(sums);
    } else {
      load_sums<1>(sums, is_first);
      multiply_panel<1>(x, 0, count, panel, tiles, next);
      store_sums<1>(sums);
    }
    if (is_last)
      for (int64_t t = tile; t < tile + 2 && t < end; ++t) write_panel(p, part.blocks, t, sums[t - tile]);
  }
  next.run(next.left());
}

// Part `i` of those of the blocks [begin, end): all groups of a pair of blocks, then the next pair.
inline PanelPart part_at(const LinearParams& p, int64_t begin, int64_t end, int64_t i) {
  const int64_t groups = p.weight.groups, parts = (groups + kPanelGroups - 1) / kPanelGroups;
  const int64_t block = begin + i / parts * kPanel, part = i % parts;
  const int64_t first = groups * part / parts, last = groups * (part + 1) / parts;
  if (p.gated != nullptr) return {{block / 2, block / 2 + p.outputs / kBlockOutputs / 2}, first, last};
  return {{block, block + 1 < end ? block + 1 : block}, first, last};  // the last of an odd number is its own partner
}

template <int kBits>
void run_panels(const LinearParams& p, int64_t begin, int64_t end) {
  TileShape shapes[8];
  for (TileShape& shape : shapes) shape = {kTileRows, kGroupBytes};
  configure_tiles(shapes);
  PanelScratch scratch;
  constexpr int64_t kTilesAtOnce = kRowsAtOnce / kTileRows;
  const int64_t tiles = pagestream::whole_tiles(p.rows) / kTileRows;
  const int64_t parts = (p.weight.groups + kPanelGroups - 1) / kPanelGroups, count = (end - begin + 1) / 2 * parts;
  for (int64_t tile = 0; tile < tiles; tile += kTilesAtOnce) {
    const int64_t last = tile + kTilesAtOnce < tiles ? tile + kTilesAtOnce : tiles;
    Widener<kBits> first(p.weight, part_at(p, begin, end, 0), scratch.weights[0]);
    first.run(first.left());
    for (int64_t i = 0; i < count; ++i) {
      PanelPart following = part_at(p, begin, end, i + 1 < count ? i + 1 : i);
      if (i + 1 == count) following.end = following.begin;
      Widener<kBits> next(p.weight, following, scratch.weights[(i + 1) % 2]);
      run_part<kBits>(p, part_at(p, begin, end, i), tile, last, scratch.weights[i % 2], scratch, next);
    }
  }
  _tile_release();
}

}  // namespace
