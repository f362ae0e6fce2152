// One query row: where it sits, what it may see, its statistics, its output: for the float32 and the tile kernel.
#pragma once

#include "kv_tile.h"
#include "softmax.h"

namespace {

using pagestream::DType;
using pagestream::kMaxRowsPerBlock;
using pagestream::kTilesPerSplit;
using pagestream::Segment;

constexpr int kSinkTokens = 4;
constexpr int kRecentTokens = 64;
constexpr int kStats = 5;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int group_size(const AttentionParams& p) { return p.num_heads / p.num_kv_heads; }
inline int padded_head(const AttentionParams& p) { return (p.head_size + kLanes - 1) / kLanes * kLanes; }

int64_t partial_floats(const AttentionParams& p) { return padded_head(p) + int64_t{sizeof(Softmax) / sizeof(float)}; }

// Row r of a block is query head r % group of position r / group.
struct Row {
  int position, visible_begin;
  int64_t token, head;
  int observed;  // place among the rows that are, or -1

  Row() = default;
  Row(const AttentionParams& p, const Segment& s, int r) {
    const int group = group_size(p), i = r / group;
    position = s.first_position + i;
    visible_begin = p.window > 0 ? max(0, position - p.window + 1) : 0;
    token = s.first_row + i;
    head = int64_t{s.kv_head} * group + r % group;
    observed = p.observed == nullptr ? -1 : p.observed[token];
  }

  float* page_masses(const AttentionParams& p) const {
    return p.page_masses + (token * p.num_heads + head) * p.max_pages;
  }
};

// The sum of the weights of keys [lo, hi), in vectors counted from key 0.
inline float sum_between(const float* weights, int lo, int hi) {
  Float total{};
  for (int j = lo / kLanes * kLanes; j < hi; j += kLanes) {
    const Int key = lane_index() + j;
    total += (key >= lo) & (key < hi) ? load(weights + j) : Float{};
  }
  return sum(total);
}

// The masses on the first and on the last positions, of weights that belong to the keys from `begin` on.
inline void add_sink_and_recent(const Row& row, const float* weights, int begin, int lo, int hi, Softmax& state) {
  if (begin < kSinkTokens) state.sink += sum_between(weights, lo, min(hi, kSinkTokens - begin));
  const int recent = row.position - kRecentTokens + 1 - begin;
  if (recent < hi) state.recent += sum_between(weights, max(lo, recent), hi);
}

// Keeps the weights of `count` keys from `begin` on, a multiple of a tile.
inline void keep_weights(const AttentionParams& p, const Row& row, const float* weights, int begin, int count,
                         float shift) {
  if (row.observed < 0) return;
  const int64_t at = (row.observed * int64_t{p.num_heads} + row.head) * p.weight_stride + begin;
  memcpy(p.weights + at, weights, sizeof(float) * count);
  for (int tile = 0; tile < count / kTile; ++tile) p.weight_shifts[at / kTile + tile] = shift;
}

template <typename T>
void write_row(T* out, const float* o, float l, int head_size) {
  for (int d = 0; d < head_size; ++d) from_float(o[d] / l, out[d]);
}

void finish_row(const AttentionParams& p, const Row& row, const Softmax& state, const float* o) {
  const int64_t at = row.token * p.out_token_stride + row.head * p.out_head_stride;
  switch (p.query_dtype) {
    case DType::kFloat32: write_row(static_cast<float*>(p.out) + at, o, state.l, p.head_size); break;
    case DType::kBFloat16: write_row(static_cast<BFloat16*>(p.out) + at, o, state.l, p.head_size); break;
    case DType::kFloat16: write_row(static_cast<Float16*>(p.out) + at, o, state.l, p.head_size); break;
  }
  const int64_t stats_row = p.observed == nullptr ? row.token : row.observed;
  if (p.stats != nullptr && stats_row >= 0) state.read_out(p.stats + (stats_row * p.num_heads + row.head) * kStats);
  if (p.page_masses == nullptr) return;
  float* masses = row.page_masses(p);
  const int first = row.visible_begin / p.page_size, last = row.position / p.page_size;
  for (int page = 0; page < p.max_pages; ++page)
    masses[page] = page < first || page > last ? 0 : exp2(masses[page] - state.log2_sum());
}

template <typename T>
PagedRows<T> paged_rows(const AttentionParams& p, const Segment& s, const void* cache, int64_t page_stride,
                        int64_t head_stride) {
  return {static_cast<const T*>(cache) + s.kv_head * head_stride, p.block_tables + s.sequence * p.block_table_stride,
          page_stride, __builtin_ctz(p.page_size), p.head_size};
}

struct TileScales {
  PagedRows<float> keys, values;
};

inline TileScales paged_scales(const AttentionParams& p, const Segment& s) {
  const auto rows = [&](const float* scales, int64_t page_stride, int64_t head_stride) {
    PagedRows<float> paged = paged_rows<float>(p, s, scales, page_stride, head_stride);
    paged.head_size = 1;
    return paged;
  };
  return {rows(p.key_scales, p.key_scale_page_stride, p.key_scale_head_stride),
          rows(p.value_scales, p.value_scale_page_stride, p.value_scale_head_stride)};
}

}  // namespace
