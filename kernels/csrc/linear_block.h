// The parts of linear.cpp: a block of weights unpacked, scales, outputs written.
#pragma once

#include "dot.h"
#include "linear_params.h"

namespace {

using pagestream::count_spans;
using pagestream::DType;
using pagestream::kBlockOutputs;
using pagestream::kGroup;
using pagestream::kGroupBytes;
using pagestream::kSpanGroups;
using pagestream::kTileRows;
using pagestream::LinearParams;
using pagestream::PackedWeight;

constexpr int kQuadBytes = kBlockOutputs * 4;  // four inputs of every output of a block

template <int kBits>
constexpr int kCodeBytes = kBlockOutputs * kGroup * kBits / 8;  // one group of a block

inline int64_t tile_height(const LinearParams& p) { return p.rows < kTileRows ? p.rows : kTileRows; }

// Where a row's part `i` of `count` is: they are stored by tiles of rows.
inline int64_t tiled(const LinearParams& p, int64_t row, int64_t i, int64_t count) {
  const int64_t height = tile_height(p);
  return (row / height * count + i) * height + row % height;
}

// The rows of either kind as a product of their own.
inline LinearParams integer_rows(LinearParams p) {
  p.rows -= p.prefill_rows;
  p.prefill_rows = 0;
  return p;
}

inline LinearParams prefill_rows(LinearParams p) {
  const int64_t before = p.rows - p.prefill_rows, element = p.dtype == DType::kFloat32 ? 4 : 2;
  p.input = static_cast<const char*>(p.input) + before * p.input_stride * element;
  p.out = static_cast<char*>(p.out) + before * p.out_stride * element;
  p.x = pagestream::prefill_x(p);
  p.rows = p.prefill_rows;
  return p;
}

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

// The codes that follow a group's soon: what the hardware fetches ahead alone leaves a core at half of its bandwidth.
template <int kBits>
inline void prefetch(const uint8_t* codes) {
  constexpr int kAhead = 3072, kLine = 64;
  for (int i = 0; i < kCodeBytes<kBits>; i += kLine) __builtin_prefetch(codes + kAhead + i);
}

inline Float load_scale(const PackedWeight& weight, int64_t at) {
  return load_wide(reinterpret_cast<const Float16*>(weight.scales) + at);
}

// What a weight with code 0 is.
template <int kBits>
inline Float load_min(const PackedWeight& weight, int64_t at) {
  if constexpr (kBits == 8) return load_scale(weight, at) * -128.0f;
  return load_wide(reinterpret_cast<const Float16*>(weight.mins) + at);
}

inline void write_block(const float* results, float* out) {
  for (int i = 0; i < kBlockOutputs; i += kLanes) store(out + i, load(results + i));
}

inline void write_block(const float* results, BFloat16* out) {
  for (int i = 0; i < kBlockOutputs; i += kLanes) store(out + i, load(results + i));
}

inline void write_block(const float* results, Float16* out) {
  for (int i = 0; i < kBlockOutputs; ++i) from_float(results[i], out[i]);
}

template <typename T>
void write_rows(const LinearParams& p, int64_t block, int64_t row, int count, const float* results) {
  const int64_t first = block * kBlockOutputs, left = p.outputs - first;
  for (int r = 0; r < count; ++r, results += kBlockOutputs) {
    T* out = static_cast<T*>(p.out) + (row + r) * p.out_stride + first;
    if (left >= kBlockOutputs) {
      write_block(results, out);
    } else {
      for (int i = 0; i < left; ++i) from_float(results[i], out[i]);
    }
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
