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

// outs [group, width] = shares [group, n] x values, over keys [begin, end).
template <typename T>
void sum_span(const PagedRows<T>& values, const PagedRows<float>& scales, const float* shares, int64_t stride,
              int group, int begin, int end, float* outs, int width) {
  const int size = values.head_size;
  memset(outs, 0, sizeof(float) * group * width);
  for (int j = begin; j < end; ++j) {
    const T* value = values.at(j);
    const float scale = sizeof(T) == sizeof(int8_t) ? *scales.at(j) : 1;
    for (int d = 0; d < size; d += kLanes) {
      const Float x = load_row(value, d, size) * scale;
      for (int h = 0; h < group; ++h) {
        float* const out = outs + h * width + d;
        store(out, fma(x, broadcast(shares[h * stride + j]), load(out)));
      }
    }
  }
}

void add_span(const AttentionParams& p, const ObservedHead& o, const ObservedSpan& span, const float* shares, int begin,
              float* results) {
  const int group = group_size(p), size = p.head_size, width = padded_head(p), first = max(begin, span.begin);
  Segment s = {};
  s.sequence = o.row.sequence;
  s.kv_head = o.kv_head;
  const TileScales scales = paged_scales(p, s);
  const auto sum_values = [&](auto type) {
    const auto values = paged_rows<decltype(type)>(p, s, p.value_cache, p.value_page_stride, p.value_head_stride);
    sum_span(values, scales.values, shares, p.weight_stride, group, first, span.end, o.scratch, width);
  };
  switch (p.cache_dtype) {
    case DType::kBFloat16: sum_values(BFloat16{}); break;
    case DType::kFloat16: sum_values(Float16{}); break;
    case DType::kInt8: sum_values(int8_t{}); break;
    default: sum_values(float{});
  }
  for (int h = 0; h < group; ++h) {
    const int64_t head = int64_t{o.kv_head} * group + h;
    const float* const out = static_cast<const float*>(p.out) + o.row.row * p.out_token_stride + head * p.out_head_stride;
    float product = 0, square = 0;
    for (int d = 0; d < size; ++d) {
      product += o.scratch[h * width + d] * out[d];
      square += out[d] * out[d];
    }
    results[2 * h] = sum_between(shares + h * p.weight_stride, first, span.end);
    results[2 * h + 1] = square > 0 ? product / square : 0;
  }
}

// The output must be float32, as the decoder's is.
void observe(const AttentionParams& p, const ObservedHead& o) {
  const int group = group_size(p), n = o.context;
  const int begin = p.window > 0 ? max(0, n - p.window) : 0;
  const int64_t first_head = int64_t{o.observed} * p.num_heads + int64_t{o.kv_head} * group;
  float* const weights = p.weights + first_head * p.weight_stride;
  for (int h = 0; h < group; ++h) {
    float* const shares = weights + h * p.weight_stride;
    const float* const stats = p.stats + (first_head + h) * kStats;
    const float* const shifts = p.weight_shifts + (first_head + h) * p.weight_stride / kTile;
    normalize(shares, shifts, begin / kTile * kTile, n, stats[2]);
    HeadRecord& record = o.records[h];
    record.entropy = stats[1];
    record.p_max = stats[2];
    record.sink = stats[3];
    record.recent = stats[4];
    record.first = begin == 0 ? shares[0] : 0;
    add_bands(shares, o.log2_counts, begin, n, record);
    if (o.page_masses != nullptr)
      add_pages(p, shares, record.first, begin, n, o.page_masses + h * int64_t{p.max_pages + 1});
  }
  for (int i = 0; i < o.num_spans; ++i)
    add_span(p, o, o.spans[i], weights, begin, o.span_shares + i * o.span_stride);
}

}  // namespace
