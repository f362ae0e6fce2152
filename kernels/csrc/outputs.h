// Rows of logits, summarised in parts by all threads while the caches have them. Parts are the same whatever the
// threads, and are added in their order, in double precision. Definitions: outputs.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "decoder_params.h"
#include "thread_pool.h"

namespace pagestream {

inline OutputSummary merge(const OutputPart* parts, int64_t count, bool with_statistics) {
  float largest = -INFINITY, second = -INFINITY;
  int32_t token = parts[0].token;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(parts[i].largest)) return {0, NAN, 0, 0, 0};
    if (parts[i].largest > largest) {
      second = largest;
      largest = parts[i].largest;
      token = parts[i].token;
    } else {
      second = std::max(second, parts[i].largest);
    }
    second = std::max(second, parts[i].second);
  }
  OutputSummary row = {static_cast<double>(token), largest, 0, 0, 0};
  if (!with_statistics || std::isinf(largest)) return row;
  double sum = 0, log_sum = 0;  // natural logarithms
  for (int64_t i = 0; i < count; ++i) {
    if (std::isinf(parts[i].largest)) continue;
    const double shift = static_cast<double>(parts[i].largest) - largest, factor = std::exp(shift);
    sum += factor * parts[i].sum;
    log_sum += factor * (std::log(2.0) * parts[i].log_sum + shift * parts[i].sum);
  }
  row.entropy = std::log(sum) - log_sum / sum;
  row.top1 = 1 / sum;
  row.margin = (1 - std::exp(static_cast<double>(second) - largest)) / sum;
  return row;
}

// Of the rows [R, V] of a step.
inline void summarize_outputs(const RowKernel& kernel, const DecoderStep& s, int64_t vocab_size, int64_t threads) {
  constexpr int64_t kOutputs = 2048, kPartsAtOnce = 4;  // of a part; about a microsecond
  const int64_t parts_of_row = (vocab_size + kOutputs - 1) / kOutputs;
  const auto has_statistics = [&](int64_t row) { return s.with_statistics != nullptr && s.with_statistics[row]; };
  std::vector<OutputPart> parts(s.num_sampled * parts_of_row);
  parallel_for(static_cast<int64_t>(parts.size()), kPartsAtOnce, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / parts_of_row, first = i % parts_of_row * kOutputs;
      const int64_t last = std::min(first + kOutputs, vocab_size);
      parts[i] = kernel.summarize(s.logits + row * vocab_size, first, last, has_statistics(row));
    }
  });
  for (int64_t row = 0; row < s.num_sampled; ++row)
    s.summary[row] = merge(parts.data() + row * parts_of_row, parts_of_row, has_statistics(row));
}

}  // namespace pagestream
