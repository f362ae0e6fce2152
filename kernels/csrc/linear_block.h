// The parts of linear.cpp: a block of weights unpacked, a group added to an output, outputs written.
#pragma once

#include "dot.h"
#include "linear_params.h"

namespace {

using pagestream::DType;
using pagestream::kBlockOutputs;
using pagestream::kGroup;
using pagestream::kQuads;
using pagestream::LinearParams;
using pagestream::PackedWeight;

constexpr int kQuadBytes = kBlockOutputs * 4;  // four inputs of every output of a block

template <int kBits>
constexpr int kCodeBytes = kBlockOutputs * kGroup * kBits / 8;  // one group of a block

// One byte for each code of a group, for kLanes outputs from `codes` on.
template <int kBits>
inline void unpack(const uint8_t* codes, Bytes (&quads)[kQuads]) {
  for (int i = 0; i < kQuads * kBits / 8; ++i) {
    const Bytes packed = load_bytes(codes + i * kQuadBytes);
    if constexpr (kBits == 8) {
      quads[i] = packed;
    } else {
      quads[i] = packed & 15;
      quads[i + kQuads / 2] = (Bytes)((UInt)packed >> 4) & 15;
    }
  }
}

// The dot product of integers under both scales.
template <int kBits>
inline Float add_group(Float acc, Int dot, float x_scale, float x_offset, Float scale, Float min) {
  acc = fma(__builtin_convertvector(dot, Float) * x_scale, scale, acc);
  return kBits == 8 ? acc : fma(broadcast(x_offset), min, acc);
}

// Scales or offsets of a block, float16 in memory.
inline Float load_scale(const uint16_t* scales, int64_t at) {
  return load_wide(reinterpret_cast<const Float16*>(scales) + at);
}

template <typename T>
void write_rows(const LinearParams& p, int64_t block, int64_t row, int count, const float* results) {
  const int64_t first = block * kBlockOutputs, left = p.outputs - first;
  const int width = left < kBlockOutputs ? static_cast<int>(left) : kBlockOutputs;
  for (int r = 0; r < count; ++r) {
    T* out = static_cast<T*>(p.out) + (row + r) * p.out_stride + first;
    for (int i = 0; i < width; ++i) from_float(results[r * kBlockOutputs + i], out[i]);
  }
}

// The outputs of one block for the rows [row, row + count): `results` is [count, kBlockOutputs].
inline void write(const LinearParams& p, int64_t block, int64_t row, int count, const float* results) {
  switch (p.dtype) {
    case DType::kFloat32: return write_rows<float>(p, block, row, count, results);
    case DType::kBFloat16: return write_rows<BFloat16>(p, block, row, count, results);
    case DType::kFloat16: return write_rows<Float16>(p, block, row, count, results);
  }
}

}  // namespace
