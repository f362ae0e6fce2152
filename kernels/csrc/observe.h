// What statistics say of the kept weights of a row: its distribution over distance, pages and spans of its context.
#pragma once

#include "rows.h"

namespace {

using pagestream::HeadRecord;
using pagestream::kBands;
using pagestream::ObservedHead;
using pagestream::ObservedSpan;

// Kept weights of keys [begin, end), begin the start of a tile, become shares of the row's mass. The largest weight is
// 2^0 of the largest shift.
void normalize(float* weights, const float* shifts, int begin, int end, float p_max) {
  float m = kMasked;
  for (int j = begin; j < end; j += kTile) m = shifts[j / kTile] > m ? shifts[j / kTile] : m;
  for (int j = begin; j < end; j += kTile) {
    const Float factor = broadcast(exp2(shifts[j / kTile] - m) * p_max);
    for (int i = j; i < j + kTile; i += kLanes) store(weights + i, load(weights + i) * factor);
  }
}

// Bands of keys [begin, n): the b-th holds the positions with n - j in [2^b, 2^(b + 1)), the last is open.
void add_bands(const float* shares, const float* log2_counts, int begin, int n, HeadRecord& record) {
  memset(record.bands, 0, sizeof record.bands);
  Float distance{};
  for (int j = begin; j < n;) {
    const int band = min(31 - __builtin_clz(n - j), kBands - 1);
    const int first = j / kLanes * kLanes, end = n - (1 << band) + 1;
    Float mass{};
    for (int i = first; i < end; i += kLanes) {
      Float share = load(shares + i);
      if (i < j || i + kLanes > end) {
        const Int key = lane_index() + i;
        share = (key >= j) & (key < end) ? share : Float{};
      }
      mass += share;
      distance = fma(share, load(log2_counts + i), distance);
    }
    record.bands[band] = sum(mass);
    j = end;
  }
  record.log2_distance = sum(distance) - record.first * log2_counts[0];
}

void add_pages(const AttentionParams& p, const float* shares, float first, int begin, int n, float* masses) {
  *masses++ = first;
  for (int page = begin / p.page_size; page * p.page_size < n; ++page)
    masses[page] = sum_between(shares, max(begin, page * p.page_size), min(n, (page + 1) * p.page_size));
}

// Of <o_span, out>, o_span the sum of shares[j] x values[j] over keys [begin, end): kVectors of them from column d on.
// Several stay in registers; one may end before it is full.
template <int kVectors, typename T>
Float project_columns(const PagedRows<T>& values, const PagedRows<float>& scales, const float* shares, int begin,
                      int end, int d, const float* out) {
  const int size = values.head_size, page_size = 1 << values.page_shift;
  const auto load_vector = [&](const auto* row, int i) {
    return kVectors == 1 ? load_row(row, d, size) : load_wide(row + d + i * kLanes);
  };
  Float sums[kVectors] = {}, total{};
  for (int j = begin; j < end;) {
    const T* value = values.at(j);
    const float* scale = sizeof(T) == sizeof(int8_t) ? scales.at(j) : nullptr;
    for (const int stop = min(end, j / page_size * page_size + page_size); j < stop; ++j, value += size) {
      const Float share = broadcast(scale == nullptr ? shares[j] : shares[j] * *scale++);
      for (int i = 0; i < kVectors; ++i) sums[i] = fma(load_vector(value, i), share, sums[i]);
    }
  }
  for (int i = 0; i < kVectors; ++i) total = fma(sums[i], load_vector(out, i), total);
  return total;
}

template <typename T>
float project_span(const PagedRows<T>& values, const PagedRows<float>& scales, const float* shares, int begin, int end,
                   const float* out) {
  constexpr int kMost = 4;
  Float total{};
  for (int d = 0; d < values.head_size;) {
    const bool has_most = d + kMost * kLanes <= values.head_size;
    const auto project = has_most ? project_columns<kMost, T> : project_columns<1, T>;
    total += project(values, scales, shares, begin, end, d, out);
    d += (has_most ? kMost : 1) * kLanes;
  }
  return sum(total);
}

void add_span(const AttentionParams& p, const ObservedHead& o, const ObservedSpan& span, const float* shares, int begin,
              float* result) {
  const int first = max(begin, span.begin);
  const float* const out = static_cast<const float*>(p.out) + o.row.row * p.out_token_stride + o.head * p.out_head_stride;
  Segment s = {};
  s.sequence = o.row.sequence;
  s.kv_head = o.head / group_size(p);
  const auto project = [&](auto type) {
    const auto values = paged_rows<decltype(type)>(p, s, p.value_cache, p.value_page_stride, p.value_head_stride);
    return project_span(values, paged_scales(p, s).values, shares, first, span.end, out);
  };
  float product, square = 0;
  switch (p.cache_dtype) {
    case DType::kBFloat16: product = project(BFloat16{}); break;
    case DType::kFloat16: product = project(Float16{}); break;
    case DType::kInt8: product = project(int8_t{}); break;
    default: product = project(float{});
  }
  for (int d = 0; d < p.head_size; ++d) square += out[d] * out[d];
  result[0] = sum_between(shares, first, span.end);
  result[1] = square > 0 ? product / square : 0;
}

// The output must be float32, as the decoder's is.
void observe(const AttentionParams& p, const ObservedHead& o) {
  const int n = o.context, begin = p.window > 0 ? max(0, n - p.window) : 0;
  const int64_t head = int64_t{o.observed} * p.num_heads + o.head;
  float* const shares = p.weights + head * p.weight_stride;
  const float* const stats = p.stats + head * kStats;
  const float* const shifts = p.weight_shifts + head * p.weight_stride / kTile;
  normalize(shares, shifts, begin / kTile * kTile, n, stats[2]);
  HeadRecord& record = *o.record;
  record.entropy = stats[1];
  record.p_max = stats[2];
  record.sink = stats[3];
  record.recent = stats[4];
  record.first = begin == 0 ? shares[0] : 0;
  add_bands(shares, o.log2_counts, begin, n, record);
  if (o.page_masses != nullptr) add_pages(p, shares, record.first, begin, n, o.page_masses);
  for (int i = 0; i < o.num_spans; ++i) add_span(p, o, o.spans[i], shares, begin, o.span_shares + i * o.span_stride);
}

}  // namespace
