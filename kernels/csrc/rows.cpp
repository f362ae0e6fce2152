// What happens to a row of the network between two products. Built once per instruction set: PAGESTREAM_ISA names the
// exported table. Loops without sums are left to the compiler's vectoriser, which changes no bit of them.
#include <cmath>

#include "decoder_params.h"
#include "vec.h"

namespace {

using pagestream::kBlockOutputs;
using pagestream::kGroup;
using pagestream::PackedWeight;

void lookup(const PackedWeight& weight, int64_t output, float* to) {
  const int64_t first = output / kBlockOutputs * weight.groups, lane = output % kBlockOutputs;
  const bool is_wide = weight.mins == nullptr;  // 8 bits
  const int quads = kGroup / (is_wide ? 4 : 8);  // four bytes of an output lie together
  for (int64_t g = 0; g < weight.groups; ++g, to += kGroup) {
    const int64_t at = (first + g) * kBlockOutputs + lane;
    const float scale = to_float(Float16{weight.scales[at]});
    const float min = is_wide ? 0 : to_float(Float16{weight.mins[at]});
    for (int i = 0; i < quads * 4; ++i) {
      const uint8_t code = weight.codes[((first + g) * quads + i / 4) * kBlockOutputs * 4 + lane * 4 + i % 4];
      if (is_wide) {
        to[i] = scale * static_cast<float>(code - 128);
      } else {
        to[i] = scale * static_cast<float>(code & 15) + min;
        to[i + kGroup / 2] = scale * static_cast<float>(code >> 4) + min;
      }
    }
  }
}

void add(float* __restrict to, const float* __restrict what, int64_t width) {
  for (int64_t i = 0; i < width; ++i) to[i] += what[i];
}

// 1 / sqrt(mean(x^2) + epsilon). The order of the sum depends on the width alone.
float inverse_rms(const float* row, int64_t width, float epsilon) {
  Float squares{};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) squares = fma(load(row + i), load(row + i), squares);
  float total = sum(squares);
  for (; i < width; ++i) total += row[i] * row[i];
  return 1.0f / sqrtf(total / static_cast<float>(width) + epsilon);
}

void norm(const float* row, const float* __restrict weight, float epsilon, int64_t width, float* __restrict out) {
  const float factor = inverse_rms(row, width, epsilon);
  for (int64_t i = 0; i < width; ++i) out[i] = row[i] * factor * weight[i];
}

void rotate(float* heads, int64_t count, int64_t head_size, const float* norm_weight, float epsilon,
            const float* __restrict cos, const float* __restrict sin) {
  const int64_t half = head_size / 2;
  for (int64_t head = 0; head < count; ++head) {
    float *__restrict first = heads + head * head_size, *__restrict second = first + half;
    if (norm_weight != nullptr) {
      const float factor = inverse_rms(first, head_size, epsilon);
      for (int64_t i = 0; i < head_size; ++i) first[i] = first[i] * factor * norm_weight[head * head_size + i];
    }
    for (int64_t i = 0; i < half; ++i) {
      const float x = first[i], y = second[i];
      first[i] = x * cos[i] - y * sin[i];
      second[i] = y * cos[i] + x * sin[i];
    }
  }
}

void gate(float* gate, const float* up, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) store(gate + i, silu(load(gate + i)) * load(up + i));
}

}  // namespace

extern "C" const pagestream::RowKernel PAGESTREAM_ISA = {lookup, add, norm, rotate, gate};
