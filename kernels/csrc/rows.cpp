// What happens to a row of the network between two products. Built once per instruction set: PAGESTREAM_ISA names the
// exported table. Loops without sums are left to the compiler's vectoriser, which changes no bit of them.
#include <cmath>

#include "decoder_params.h"
#include "softmax.h"

namespace {

using pagestream::kBlockOutputs;
using pagestream::kGroup;
using pagestream::OutputPart;
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

// One more logit; tokens may come in any order.
inline void take(OutputPart& part, float logit, int32_t token) {
  if (logit > part.largest || (logit == part.largest && token < part.token)) {
    part.second = part.largest;
    part.largest = logit;
    part.token = token;
  } else if (logit > part.second) {
    part.second = logit;
  }
}

OutputPart find_largest(const float* logits, int64_t begin, int64_t end) {
  const int32_t first = static_cast<int32_t>(begin);
  OutputPart part = {first, -INFINITY, -INFINITY, 0, 0};
  Float largest = broadcast(-INFINITY), second = largest;
  Int token = lane_index() + first, at = token, any_nan{};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes, at += kLanes) {
    const Float x = load(logits + i);
    const Int is_larger = x > largest;
    const Float lesser = is_larger ? largest : x;
    any_nan |= x != x;
    second = lesser > second ? lesser : second;
    largest = is_larger ? x : largest;
    token = is_larger ? at : token;
  }
  bool has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    has_nan |= any_nan[lane] != 0;
    take(part, largest[lane], token[lane]);
    take(part, second[lane], INT32_MAX);
  }
  for (; i < end; ++i) {
    has_nan |= logits[i] != logits[i];
    take(part, logits[i], static_cast<int32_t>(i));
  }
  if (has_nan) part.largest = NAN;
  return part;
}

OutputPart summarize(const float* logits, int64_t begin, int64_t end, bool with_statistics) {
  OutputPart part = find_largest(logits, begin, end);
  if (!with_statistics || !(part.largest > -INFINITY)) return part;
  Float weights{}, logs{};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const Float x = clamp_exponent((load(logits + i) - part.largest) * kLog2E), weight = exp2(x);
    weights += weight;
    logs = fma(weight, x, logs);
  }
  part.sum = sum(weights);
  part.log_sum = sum(logs);
  for (; i < end; ++i) {
    const float x = (logits[i] - part.largest) * kLog2E, weight = exp2(x);
    part.sum += weight;
    part.log_sum += weight * (x > kMinExponent ? x : kMinExponent);
  }
  return part;
}

}  // namespace

extern "C" const pagestream::RowKernel PAGESTREAM_ISA = {lookup, add, norm, rotate, gate, summarize};
