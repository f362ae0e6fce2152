// Many rows: dot products of groups by AMX tiles, in exact integers, then the arithmetic of linear.cpp on 16 outputs at
// a time. A tile instruction takes 64 inputs, a group has 32: the other half multiplies the fine bytes by the codes
// where the first multiplies the coarse bytes by 16 times the codes.
#pragma once

#include "amx.h"
#include "linear_block.h"

namespace {

constexpr int kFewestTileRows = 6;
constexpr int kTileBytes = 1024, kTileInts = 256;
constexpr int kPair = 2;         // blocks that share a tile of the input
constexpr int kChunkRows = 128;  // that share an unpacked span of a pair

// As instructions: g++ takes numbers of tiles from the source text alone, not from a template.
template <int kTile>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}

template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
}

// Signed bytes of kX by unsigned bytes of kCodes.
template <int kSum, int kX, int kCodes>
inline void multiply_tiles() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kCodes));
}

struct alignas(64) Scratch {
  uint8_t codes[kPair][kSpanGroups][kTileBytes];
  float scales[kPair][kSpanGroups][kBlockOutputs], mins[kPair][kSpanGroups][kBlockOutputs];
  int32_t dots[kSpanGroups][2][kPair][kTileInts];  // coarse and fine apart for 8 bits
  float totals[kPair][kChunkRows][kBlockOutputs];
};

inline Int load_ints(const int32_t* p) {
  Int x;
  memcpy(&x, p, sizeof x);
  return x;
}

// The tile of one group. 4 bits: 16 times the codes, then the codes. 8 bits: the codes.
template <int kBits>
inline void unpack_tile(const uint8_t* codes, uint8_t* tile) {
  Bytes quads[kQuads];
  unpack<kBits>(codes, quads);
  for (int q = 0; q < kQuads; ++q) {
    if constexpr (kBits == 4) {
      const Bytes upper = (Bytes)((UInt)quads[q] << 4);
      memcpy(tile + q * kQuadBytes, &upper, sizeof upper);
      memcpy(tile + (q + kQuads) * kQuadBytes, &quads[q], sizeof quads[q]);
    } else {
      memcpy(tile + q * kQuadBytes, &quads[q], sizeof quads[q]);
    }
  }
}

template <int kBits>
void unpack_span(const PackedWeight& weight, int64_t block, int64_t begin, int64_t count, int half, Scratch& scratch) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t group = block * weight.groups + begin + i;
    unpack_tile<kBits>(weight.codes + group * kCodeBytes<kBits>, scratch.codes[half][i]);
    store(scratch.scales[half][i], load_scale(weight, group * kBlockOutputs));
    store(scratch.mins[half][i], load_min<kBits>(weight, group * kBlockOutputs));
  }
}

// One tile of the input by those of both blocks; what the registers held two calls before is written.
template <int kTurn>
inline void multiply_pair(const int8_t* x, int64_t stride, const Scratch& scratch, int64_t group, int32_t* before) {
  constexpr int kSum = 2 * kTurn, kX = 4 + kTurn;
  if (before != nullptr) {
    store_tile<kSum>(before, kQuadBytes);
    store_tile<kSum + 1>(before + kTileInts, kQuadBytes);
  }
  zero_tile<kSum>();
  zero_tile<kSum + 1>();
  load_tile<kX>(x, stride);
  load_tile<6>(scratch.codes[0][group], kQuadBytes);
  multiply_tiles<kSum, kX, 6>();
  load_tile<7>(scratch.codes[1][group], kQuadBytes);
  multiply_tiles<kSum + 1, kX, 7>();
}

// Dot products of a span.
template <int kBits>
void multiply_span(const int8_t* x, int64_t height, int64_t groups, Scratch& scratch) {
  const int64_t stride = kGroupBytes, step = height * kGroupBytes;
  if constexpr (kBits == 8) {
    for (int64_t i = 0; i < groups; ++i) {
      multiply_pair<0>(x + i * step, stride, scratch, i, i == 0 ? nullptr : scratch.dots[i - 1][0][0]);
      multiply_pair<1>(x + i * step + kFine, stride, scratch, i, i == 0 ? nullptr : scratch.dots[i - 1][1][0]);
    }
    store_tile<0>(scratch.dots[groups - 1][0][0], kQuadBytes);
    store_tile<1>(scratch.dots[groups - 1][0][1], kQuadBytes);
    store_tile<2>(scratch.dots[groups - 1][1][0], kQuadBytes);
    store_tile<3>(scratch.dots[groups - 1][1][1], kQuadBytes);
  } else {
    int64_t i = 0;
    for (; i + 1 < groups; i += 2) {
      multiply_pair<0>(x + i * step, stride, scratch, i, i == 0 ? nullptr : scratch.dots[i - 2][0][0]);
      multiply_pair<1>(x + (i + 1) * step, stride, scratch, i + 1, i == 0 ? nullptr : scratch.dots[i - 1][0][0]);
    }
    if (i < groups) multiply_pair<0>(x + i * step, stride, scratch, i, i == 0 ? nullptr : scratch.dots[i - 2][0][0]);
    const int64_t even = (groups - 1) / 2 * 2, odd = groups / 2 * 2 - 1;
    store_tile<0>(scratch.dots[even][0][0], kQuadBytes);
    store_tile<1>(scratch.dots[even][0][1], kQuadBytes);
    if (odd < 0) return;
    store_tile<2>(scratch.dots[odd][0][0], kQuadBytes);
    store_tile<3>(scratch.dots[odd][0][1], kQuadBytes);
  }
}

// Rows [row, row + kRows) of the input, `at` rows into the tile and `to` rows into the chunk.
template <int kBits, int kRows>
inline void scale_rows(const LinearParams& p, int64_t span, int64_t groups, int64_t row, int64_t at, int64_t to,
                       Scratch& scratch) {
  const int64_t all = p.weight.groups, spans = count_spans(all);
  const float* sums = p.x_sums + row * all + span * kSpanGroups;
  Float acc[kPair][kRows]{};
  for (int64_t i = 0; i < groups; ++i) {
    for (int r = 0; r < kRows; ++r) {
      const Float sum = broadcast(sums[r * all + i]);
      for (int half = 0; half < kPair; ++half) acc[half][r] = fma(sum, load(scratch.mins[half][i]), acc[half][r]);
    }
  }
  for (int64_t i = 0; i < groups; ++i) {
    for (int half = 0; half < kPair; ++half) {
      const Float scale = load(scratch.scales[half][i]);
      for (int r = 0; r < kRows; ++r) {
        Int dot = load_ints(scratch.dots[i][0][half] + (at + r) * kBlockOutputs);
        if constexpr (kBits == 8) {
          dot = (dot << kFineBits) + load_ints(scratch.dots[i][1][half] + (at + r) * kBlockOutputs);
        }
        acc[half][r] = fma(__builtin_convertvector(dot, Float), scale, acc[half][r]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Float x_scale = broadcast(p.x_scales[(row + r) * spans + span]);
    for (int half = 0; half < kPair; ++half) {
      float* total = scratch.totals[half][to + r];
      store(total, fma(acc[half][r], x_scale, span == 0 ? Float{} : load(total)));
    }
  }
}

template <int kBits, int kRows = 8>
void scale_tile(const LinearParams& p, int64_t span, int64_t groups, int64_t row, int64_t end, int64_t at, int64_t to,
                Scratch& scratch) {
  for (; end - row >= kRows; row += kRows, at += kRows, to += kRows)
    scale_rows<kBits, kRows>(p, span, groups, row, at, to, scratch);
  if constexpr (kRows > 1) scale_tile<kBits, kRows / 2>(p, span, groups, row, end, at, to, scratch);
}

// Two blocks of outputs for the rows [begin, end): spans outside, so that one is unpacked at a time.
template <int kBits>
void run_pair(const LinearParams& p, const int64_t (&blocks)[kPair], int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t all = p.weight.groups, spans = count_spans(all), height = tile_height(p);
  for (int64_t span = 0; span < spans; ++span) {
    const int64_t first = span * kSpanGroups, groups = first + kSpanGroups < all ? kSpanGroups : all - first;
    for (int half = 0; half < kPair; ++half) unpack_span<kBits>(p.weight, blocks[half], first, groups, half, scratch);
    for (int64_t row = begin; row < end; row += height) {
      multiply_span<kBits>(integers(p, row, first), height, groups, scratch);
      scale_tile<kBits>(p, span, groups, row, row + height < end ? row + height : end, 0, row - begin, scratch);
    }
  }
  for (int half = 0; half < kPair; ++half)
    write(p, blocks[half], begin, static_cast<int>(end - begin), scratch.totals[half][0]);
}

template <int kBits>
void run_tiles(const LinearParams& p, int64_t begin, int64_t end) {
  Tiles::Shape shapes[8];
  for (int tile = 0; tile < 8; ++tile) {
    const bool codes = tile >= 6, x = tile >= 4 && !codes;
    shapes[tile].rows = static_cast<uint8_t>(codes ? (kBits == 4 ? 2 * kQuads : kQuads) : tile_height(p));
    shapes[tile].bytes_per_row = x && kBits == 8 ? kGroupBytes / 2 : kGroupBytes;
  }
  const Tiles tiles(shapes);
  Scratch scratch;
  for (int64_t row = 0; row < p.rows; row += kChunkRows)
    for (int64_t block = begin; block < end; block += kPair)  // the last of an odd number is its own partner
      run_pair<kBits>(p, {block, block + 1 < end ? block + 1 : block}, row,
                      row + kChunkRows < p.rows ? row + kChunkRows : p.rows, scratch);
}

}  // namespace
