// Linear layers whose weights stay 4- or 8-bit in memory. Built once per instruction set: PAGESTREAM_ISA names the
// exported table.
//
// The input becomes 12-bit integers with one scale per row and span of 256. A weight is scale * code + min with its
// group's scale and min, so a span of an output is
//     x_scale * (sum over groups of min * sum(x), then of scale * dot(codes, x))
// with sums and dot products of integers exact, and groups, then spans, added in float32 in their order. So a row's
// bits depend on nothing but the row, and all instruction sets with fused multiply-add agree.
#include "linear_block.h"
#if defined(__AMX_INT8__)
#include "linear_amx.h"
#include "linear_prefill.h"
#endif

namespace {

constexpr int kMaxRows = kLanes == 16 ? 8 : 4;  // that share a group of unpacked weights in registers
constexpr float kSteps = 2039;                  // the largest 16 * 127 + 7 that has both signs in two bytes
constexpr float kSmallest = 1e-30f;             // a span of the input below it counts as zeros

template <int kBits, int kRows>
void run_rows(const LinearParams& p, int64_t block, int64_t row) {
  const PackedWeight& weight = p.weight;
  const int64_t spans = count_spans(weight.groups);
  const int64_t height = tile_height(p);
  int64_t at[kRows];  // a group further in is `height` further on
  for (int r = 0; r < kRows; ++r) at[r] = tiled(p, row + r, 0, weight.groups);
  float results[kRows * kBlockOutputs];
  for (int lane = 0; lane < kBlockOutputs; lane += kLanes) {
    Float total[kRows]{};
    for (int64_t span = 0; span < spans; ++span) {
      const int64_t begin = span * kSpanGroups;
      const int64_t end = begin + kSpanGroups < weight.groups ? begin + kSpanGroups : weight.groups;
      Float acc[kRows]{};
      for (int64_t g = begin; g < end; ++g) {
        const Float min = load_min<kBits>(weight, (block * weight.groups + g) * kBlockOutputs + lane);
        for (int r = 0; r < kRows; ++r) acc[r] = fma(broadcast(p.x_sums[at[r] + g * height]), min, acc[r]);
      }
      for (int64_t g = begin; g < end; ++g) {
        const int64_t group = block * weight.groups + g;
        const uint8_t* codes = weight.codes + group * kCodeBytes<kBits>;
        prefetch<kBits>(codes);
        Bytes quads[kQuads];
        unpack<kBits>(codes + lane * 4, quads);
        const Float scale = load_scale(weight, group * kBlockOutputs + lane);
        for (int r = 0; r < kRows; ++r) {
          const Int dot = dot_group<kBits>(quads, p.x + (at[r] + g * height) * kGroupBytes);
          acc[r] = fma(__builtin_convertvector(dot, Float), scale, acc[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) total[r] = fma(acc[r], broadcast(p.x_scales[tiled(p, row + r, span, spans)]), total[r]);
    }
    for (int r = 0; r < kRows; ++r) store(results + r * kBlockOutputs + lane, total[r]);
  }
  write(p, block, row, kRows, results);
}

template <int kBits, int kRows = kMaxRows>
void run_block(const LinearParams& p, int64_t block, int64_t row) {
  for (; p.rows - row >= kRows; row += kRows) run_rows<kBits, kRows>(p, block, row);
  if constexpr (kRows > 1) run_block<kBits, kRows / 2>(p, block, row);
}

template <int kBits>
void run_blocks(const LinearParams& p, int64_t begin, int64_t end) {
#if defined(__AMX_INT8__)
  if (p.rows >= kFewestTileRows) return run_tiles<kBits>(p, begin, end);
#endif
  for (int64_t block = begin; block < end; ++block) run_block<kBits>(p, block, 0);
}

template <int kBits>
void run_kinds(const LinearParams& p, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)  // first: they have the time to fetch weights, and few others would wait for them
  if (p.prefill_rows > 0) run_panels<kBits>(prefill_rows(p), begin, end);
#endif
  run_blocks<kBits>(integer_rows(p), begin, end);
}

void run(const LinearParams& p, int64_t begin, int64_t end) {
  p.weight.mins == nullptr ? run_kinds<8>(p, begin, end) : run_kinds<4>(p, begin, end);
}

// NaN if there is one: as integers NaNs are above everything.
template <typename T>
float largest_magnitude(const T* x, int64_t count) {
  Int largest{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Int magnitude = (Int)load_wide(x + i) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
  return from_bits(static_cast<uint32_t>(bits));
}

// A group of the input times `inverse`, rounded, to `to`: coarse and fine bytes. The sum of the integers.
template <typename T>
float round_group(const T* from, float inverse, int8_t* to) {
  typedef int8_t Codes __attribute__((vector_size(kLanes)));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded value in the low bits
  Int total{};
  for (int i = 0; i < kGroup; i += kLanes) {
    const Int rounded = (Int)(load_wide(from + i) * inverse + kRound) - static_cast<int32_t>(bits_of(kRound));
    const Int coarse = (rounded + (1 << (kFineBits - 1))) >> kFineBits;
    const Codes upper = __builtin_convertvector(coarse, Codes);
    const Codes lower = __builtin_convertvector(rounded - (coarse << kFineBits), Codes);
    memcpy(to + i, &upper, sizeof upper);
    memcpy(to + i + kFine, &lower, sizeof lower);
    total += rounded;
  }
  return sum(__builtin_convertvector(total, Float));
}

template <typename T>
void quantize_row(const LinearParams& p, int64_t row) {
  const int64_t groups = p.weight.groups, spans = count_spans(groups);
  const T* from = static_cast<const T*>(p.input) + row * p.input_stride;
  for (int64_t span = 0; span < spans; ++span) {
    const int64_t first = span * kSpanGroups, last = first + kSpanGroups < groups ? first + kSpanGroups : groups;
    const float largest = largest_magnitude(from + first * kGroup, (last - first) * kGroup);
    const float inverse = largest < kSmallest ? 0 : kSteps / largest;
    p.x_scales[tiled(p, row, span, spans)] = largest < kSmallest ? 0 : largest / kSteps;
    for (int64_t g = first; g < last; ++g) {
      const int64_t to = tiled(p, row, g, groups);
      p.x_sums[to] = round_group(from + g * kGroup, inverse, p.x + to * kGroupBytes);
    }
  }
}

template <typename T>
void quantize_rows(const LinearParams& all, int64_t begin, int64_t end) {
  const LinearParams p = integer_rows(all);
  for (int64_t row = begin; row < end && row < p.rows; ++row) quantize_row<T>(p, row);
#if defined(__AMX_BF16__)
  const LinearParams prefill = prefill_rows(all);
  for (int64_t row = begin > p.rows ? begin : p.rows; row < end; ++row) narrow_row<T>(prefill, row - p.rows);
#endif
}

void quantize(const LinearParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32: return quantize_rows<float>(p, begin, end);
    case DType::kBFloat16: return quantize_rows<BFloat16>(p, begin, end);
    case DType::kFloat16: return quantize_rows<Float16>(p, begin, end);
  }
}

}  // namespace

#if defined(__AMX_BF16__)
constexpr bool kHasPrefill = true;
#else
constexpr bool kHasPrefill = false;
#endif
extern "C" const pagestream::LinearKernel PAGESTREAM_ISA = {kHasPrefill, quantize, run};
