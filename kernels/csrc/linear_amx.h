// Many rows: dot products of groups by AMX tiles, in exact integers, then the arithmetic of linear.cpp on 16 outputs at
// a time. A tile instruction takes 64 inputs, a group has 32: the other half multiplies the fine bytes by the codes
// where the first multiplies the coarse bytes by 16 times the codes.
#pragma once

#include "amx.h"
#include "linear_block.h"

namespace {

constexpr int kFewestTileRows = 9;  // fewer are faster one by one
constexpr int kTileBytes = 1024, kTileInts = 256;
constexpr int kPair = 2;         // blocks that share a tile of the input
constexpr int kChunkRows = 128;  // that share an unpacked span of a pair

// Signed bytes of kX by unsigned bytes of kCodes.
template <int kSum, int kX, int kCodes>
inline void multiply_tiles() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kCodes));
}

struct alignas(64) Scratch {
  uint8_t codes[kPair][kSpanGroups][kTileBytes];
  float scales[kPair][kSpanGroups][kBlockOutputs], mins[kPair][kSpanGroups][kBlockOutputs];
  int32_t dots[2 * kSpanGroups][kPair][kTileInts];  // [groups], or [groups, coarse and fine] for 8 bits
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
    prefetch<kBits>(weight.codes + group * kCodeBytes<kBits>);
    unpack_tile<kBits>(weight.codes + group * kCodeBytes<kBits>, scratch.codes[half][i]);
    store(scratch.scales[half][i], load_scale(weight, group * kBlockOutputs));
    store(scratch.mins[half][i], load_min<kBits>(weight, group * kBlockOutputs));
  }
}

// One tile of the input by those of both blocks.
template <int kTurn>
inline void multiply_pair(const int8_t* x, const uint8_t* codes) {
  constexpr int kSum = 2 * kTurn, kX = 4 + kTurn;
  zero_tile<kSum>();
  zero_tile<kSum + 1>();
  load_tile<kX>(x, kGroupBytes);
  load_tile<6>(codes, kQuadBytes);
  multiply_tiles<kSum, kX, 6>();
  load_tile<7>(codes + kSpanGroups * kTileBytes, kQuadBytes);
  multiply_tiles<kSum + 1, kX, 7>();
}

template <int kTurn>
inline void store_pair(int32_t (&dots)[kPair][kTileInts]) {
  store_tile<2 * kTurn>(dots[0], kQuadBytes);
  store_tile<2 * kTurn + 1>(dots[1], kQuadBytes);
}

// Dot products of a span. A product is written two steps later: the next two are under way by then.
template <int kBits>
void multiply_span(const int8_t* x, int64_t height, int64_t groups, Scratch& scratch) {
  const auto x_at = [&](int64_t step) {
    return kBits == 4 ? x + step * height * kGroupBytes : x + step / 2 * height * kGroupBytes + step % 2 * kFine;
  };
  const auto codes_at = [&](int64_t step) { return scratch.codes[0][kBits == 4 ? step : step / 2]; };
  const int64_t steps = kBits == 4 ? groups : 2 * groups;
  for (int64_t step = 0; step < steps + 2; step += 2) {
    if (step > 0) store_pair<0>(scratch.dots[step - 2]);
    if (step < steps) multiply_pair<0>(x_at(step), codes_at(step));
    if (step > 0 && step - 1 < steps) store_pair<1>(scratch.dots[step - 1]);
    if (step + 1 < steps) multiply_pair<1>(x_at(step + 1), codes_at(step + 1));
  }
}

// Adds a span to the totals of rows of one tile.
template <int kBits, int kRows>
inline void scale_rows(const LinearParams& p, int64_t span, int64_t groups, int64_t row, float* totals,
                       const Scratch& scratch) {
  constexpr int kDots = kPair * kTileInts * (kBits == 4 ? 1 : 2);  // of a group
  const int64_t height = tile_height(p), spans = count_spans(p.weight.groups);
  const float* sums = p.x_sums + tiled(p, row, span * kSpanGroups, p.weight.groups);
  const float* x_scales = p.x_scales + tiled(p, row, span, spans);
  const int32_t* dots = scratch.dots[0][0] + row % height * kBlockOutputs;
  Float acc[kPair][kRows]{};
  for (int64_t i = 0; i < groups; ++i) {
    for (int r = 0; r < kRows; ++r) {
      const Float sum = broadcast(sums[i * height + r]);
      for (int half = 0; half < kPair; ++half) acc[half][r] = fma(sum, load(scratch.mins[half][i]), acc[half][r]);
    }
  }
  for (int64_t i = 0; i < groups; ++i, dots += kDots) {
    for (int half = 0; half < kPair; ++half) {
      const Float scale = load(scratch.scales[half][i]);
      for (int r = 0; r < kRows; ++r) {
        const int32_t* at = dots + half * kTileInts + r * kBlockOutputs;
        Int dot = load_ints(at);
        if constexpr (kBits == 8) dot = (dot << kFineBits) + load_ints(at + kPair * kTileInts);
        acc[half][r] = fma(__builtin_convertvector(dot, Float), scale, acc[half][r]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < kPair; ++half) {
      float* total = totals + (half * kChunkRows + r) * kBlockOutputs;
      store(total, fma(acc[half][r], broadcast(x_scales[r]), span == 0 ? Float{} : load(total)));
    }
  }
}

template <int kBits, int kRows = 8>
void scale_tile(const LinearParams& p, int64_t span, int64_t groups, int64_t row, int64_t end, float* totals,
                const Scratch& scratch) {
  for (; end - row >= kRows; row += kRows, totals += kRows * kBlockOutputs)
    scale_rows<kBits, kRows>(p, span, groups, row, totals, scratch);
  if constexpr (kRows > 1) scale_tile<kBits, kRows / 2>(p, span, groups, row, end, totals, scratch);
}

// Two blocks of outputs for the rows [begin, end): spans outside, so that one is unpacked at a time.
template <int kBits>
void run_pair(const LinearParams& p, const int64_t (&blocks)[kPair], int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t all = p.weight.groups, spans = count_spans(all), height = tile_height(p);
  for (int64_t span = 0; span < spans; ++span) {
    const int64_t first = span * kSpanGroups, groups = first + kSpanGroups < all ? kSpanGroups : all - first;
    for (int half = 0; half < kPair; ++half) unpack_span<kBits>(p.weight, blocks[half], first, groups, half, scratch);
    for (int64_t row = begin; row < end; row += height) {
      multiply_span<kBits>(p.x + tiled(p, row, first, all) * kGroupBytes, height, groups, scratch);
      scale_tile<kBits>(p, span, groups, row, row + height < end ? row + height : end, scratch.totals[0][row - begin],
                        scratch);
    }
  }
  for (int half = 0; half < kPair; ++half)
    write(p, blocks[half], begin, static_cast<int>(end - begin), scratch.totals[half][0]);
}

template <int kBits>
void run_tiles(const LinearParams& p, int64_t begin, int64_t end) {
  TileShape shapes[8];
  for (int tile = 0; tile < 8; ++tile) {
    const bool codes = tile >= 6, x = tile >= 4 && !codes;
    shapes[tile].rows = static_cast<uint8_t>(codes ? (kBits == 4 ? 2 * kQuads : kQuads) : tile_height(p));
    shapes[tile].bytes_per_row = x && kBits == 8 ? kGroupBytes / 2 : kGroupBytes;
  }
  configure_tiles(shapes);
  Scratch scratch;
  for (int64_t row = 0; row < p.rows; row += kChunkRows)
    for (int64_t block = begin; block < end; block += kPair)  // the last of an odd number is its own partner
      run_pair<kBits>(p, {block, block + 1 < end ? block + 1 : block}, row,
                      row + kChunkRows < p.rows ? row + kChunkRows : p.rows, scratch);
  _tile_release();
}

}  // namespace
