// What the quantised linear kernels receive. Layouts are described in packing.py; sizes below are per block.
#pragma once

#include "params.h"

namespace pagestream {

constexpr int kGroup = 32;         // inputs that share a scale of the weight
constexpr int kBlockOutputs = 16;  // outputs that are stored together
constexpr int kSpanGroups = 8;     // groups that share a scale of the input
constexpr int kGroupBytes = 64;    // of a row of the input as integers
constexpr int kTileRows = 16;      // rows whose integers are stored together

struct PackedWeight {
  const uint8_t* codes;    // [blocks, groups, 512 or 256]
  const uint16_t* scales;  // float16 [blocks, groups, 16]
  const uint16_t* mins;    // likewise; null for 8-bit codes, where it is -128 scales
  int64_t groups;          // inputs / 32
};

struct LinearParams {
  PackedWeight weight;
  const void* input;  // [M, K]
  void* out;          // [M, N]
  int64_t input_stride, out_stride;
  int64_t rows, outputs;  // M, N
  int64_t prefill_rows;   // P: the last rows are multiplied in bfloat16; 0 where LinearKernel::has_prefill is not set
  DType dtype;            // of input and out
  // The input as quantize() writes it and run() reads it. The first I = M - P rows, as 12-bit integers, come in T tiles
  // of h: h = min(I, 16), T = ceil(I / h).
  int8_t* x;        // [T, groups, h, 2, 32]: upper 8 and lower 4 bits, both signed; aligned to 64 bytes
                    // then bfloat16 [ceil(P / 16), groups, 16, 32]
  float* x_sums;    // [T, groups, h]: sum of the integers
  float* x_scales;  // [T, spans, h], spans = ceil(groups / 8)
  // Where there is one, prompt rows leave nothing in `out` but, here, silu(first half) * second half of their outputs,
  // as another product's prefill_x(): N is a multiple of 64 then, and blocks are run in pairs.
  int8_t* gated = nullptr;
};

static inline int64_t count_spans(int64_t groups) { return (groups + kSpanGroups - 1) / kSpanGroups; }

// Rows that their integers have room for: those of whole tiles.
static inline int64_t tiled_rows(int64_t rows) {
  const int64_t height = rows < kTileRows ? rows : kTileRows;
  return height == 0 ? 0 : (rows + height - 1) / height * height;
}

// The prompt rows of x.
static inline int8_t* prefill_x(const LinearParams& p) {
  return p.x + tiled_rows(p.rows - p.prefill_rows) * p.weight.groups * kGroupBytes;
}

static inline int64_t whole_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

// One build of linear.cpp for one instruction set.
struct LinearKernel {
  bool has_prefill;
  void (*quantize)(const LinearParams&, int64_t row_begin, int64_t row_end);
  void (*run)(const LinearParams&, int64_t block_begin, int64_t block_end);
};

}  // namespace pagestream
