// What the quantised linear kernels receive. Layouts are described in operators.py; sizes below are per block.
#pragma once

#include "params.h"

namespace pagestream {

constexpr int kGroup = 32;          // inputs that share a scale
constexpr int kBlockOutputs = 16;   // outputs that are stored together
constexpr int kQuads = kGroup / 4;  // an integer dot instruction takes four inputs

struct PackedWeight {
  const uint8_t* codes;    // [blocks, groups, 512 or 256]
  const uint16_t* scales;  // float16 [blocks, groups, 16]
  const uint16_t* mins;    // likewise; null for 8-bit codes, which are symmetric
  int64_t groups;          // inputs / 32
};

struct LinearParams {
  PackedWeight weight;
  const void* input;  // [M, K]
  void* out;          // [M, N]
  int64_t input_stride, out_stride;
  int64_t rows, outputs;  // M, N
  DType dtype;            // of input and out
  // The input as 8-bit integers, written by quantize() and read by run().
  int8_t* x;         // [M, K]
  float* x_scales;   // [M, groups]
  float* x_offsets;  // [M, groups]: scale times sum of the integers
  int32_t* x_sums;   // [M, groups]: sum of the integers
};

// One build of linear.cpp for one instruction set.
struct LinearKernel {
  void (*quantize)(const LinearParams&, int64_t row_begin, int64_t row_end);
  void (*run)(const LinearParams&, int64_t block_begin, int64_t block_end);
};

}  // namespace pagestream
