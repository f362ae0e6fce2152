// Linear layers whose weights stay 4- or 8-bit in memory. Built once per instruction set: PAGESTREAM_ISA names the
// exported table.
//
// The input becomes 8-bit integers with one scale per row and group of 32. A group's dot product is exact in 32-bit
// integers; groups are added in float32 in their order. So a row's bits depend on nothing but the row, and all
// instruction sets with fused multiply-add agree.
#include "linear_block.h"

namespace {

constexpr int kMaxRows = kLanes == 16 ? 8 : 4;  // that share a group of unpacked weights in registers
constexpr float kSmallest = 1e-30f;             // a group of the input below it counts as zeros

template <int kBits, int kRows>
void run_rows(const LinearParams& p, int64_t block, int64_t row) {
  const PackedWeight& weight = p.weight;
  float results[kRows * kBlockOutputs];
  for (int lane = 0; lane < kBlockOutputs; lane += kLanes) {
    Float acc[kRows]{};
    for (int64_t g = 0; g < weight.groups; ++g) {
      const int64_t group = block * weight.groups + g, at = group * kBlockOutputs + lane;
      Bytes quads[kQuads];
      unpack<kBits>(weight.codes + group * kCodeBytes<kBits> + lane * 4, quads);
      const Float scale = load_scale(weight.scales, at), min = kBits == 8 ? Float{} : load_scale(weight.mins, at);
      for (int r = 0; r < kRows; ++r) {
        const int64_t x_group = (row + r) * weight.groups + g;
        const int8_t* x = p.x + x_group * kGroup;
        Int dot = start_dot<kBits>(p.x_sums[x_group]);
        for (int q = 0; q < kQuads; ++q) dot = dot4<kBits>(dot, quads[q], broadcast_quad(x + 4 * q));
        acc[r] = add_group<kBits>(acc[r], dot, p.x_scales[x_group], p.x_offsets[x_group], scale, min);
      }
    }
    for (int r = 0; r < kRows; ++r) store(results + r * kBlockOutputs + lane, acc[r]);
  }
  write(p, block, row, kRows, results);
}

template <int kBits, int kRows = kMaxRows>
void run_block(const LinearParams& p, int64_t block, int64_t row) {
  for (; p.rows - row >= kRows; row += kRows) run_rows<kBits, kRows>(p, block, row);
  if constexpr (kRows > 1) run_block<kBits, kRows / 2>(p, block, row);
}

void run(const LinearParams& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block)
    p.weight.mins == nullptr ? run_block<8>(p, block, 0) : run_block<4>(p, block, 0);
}

// NaN if the group holds one: as integers NaNs are above everything.
template <typename T>
float largest_magnitude(const T* x) {
  Int largest{};
  for (int i = 0; i < kGroup; i += kLanes) {
    const Int magnitude = (Int)load_wide(x + i) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
  return from_bits(static_cast<uint32_t>(bits));
}

template <typename T>
void quantize_rows(const LinearParams& p, int64_t begin, int64_t end) {
  typedef int8_t Codes __attribute__((vector_size(kLanes)));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded value in the low bits
  const int64_t groups = p.weight.groups;
  for (int64_t group = begin * groups; group < end * groups; ++group) {
    const T* from = static_cast<const T*>(p.input) + group / groups * p.input_stride + group % groups * kGroup;
    const float largest = largest_magnitude(from);
    const float inverse = largest < kSmallest ? 0 : 127.0f / largest;
    Int total{};
    for (int i = 0; i < kGroup; i += kLanes) {
      const Int rounded = (Int)(load_wide(from + i) * inverse + kRound) - static_cast<int32_t>(bits_of(kRound));
      const Codes codes = __builtin_convertvector(rounded, Codes);
      memcpy(p.x + group * kGroup + i, &codes, sizeof codes);
      total += rounded;
    }
    int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    p.x_sums[group] = sum;
    p.x_scales[group] = largest < kSmallest ? 0 : largest / 127.0f;
    p.x_offsets[group] = p.x_scales[group] * static_cast<float>(sum);
  }
}

void quantize(const LinearParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32: return quantize_rows<float>(p, begin, end);
    case DType::kBFloat16: return quantize_rows<BFloat16>(p, begin, end);
    case DType::kFloat16: return quantize_rows<Float16>(p, begin, end);
  }
}

}  // namespace

extern "C" const pagestream::LinearKernel PAGESTREAM_ISA = {quantize, run};
