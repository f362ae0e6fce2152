// The 16 query rows of one warp: scores, softmax and output stay in its registers while keys and values stream by.
#pragma once

#include "softmax.h"

namespace pagestream::gpu {

// Products of fp16 when the cache holds e4m3, which fits into it, else of T, the type of query and cache.
template <typename T, typename Cache>
struct ProductType {
  using Type = T;
};
template <typename T>
struct ProductType<T, Float8> {
  using Type = Float16;
};

template <typename T, typename Cache, int kHeadSize, typename Stats>
class WarpRows {
  using Ring = KvRing<Cache, kHeadSize>;
  using Product = typename ProductType<T, Cache>::Type;
  static constexpr int kSteps = kHeadSize / 16;

 public:
  // Rows [first, first + 16) of the sequence, as far as they exist: the others compute with zeros and are not stored.
  DEVICE WarpRows(const GpuParams& p, const Sequence& sequence, int kv_head, int first)
      : p_(p),
        rows_(smaller(kWarpRows, sequence.num_rows() - first)),
        visible_(sequence, first, first + larger(rows_, 1) - 1, p.window),
        position_{sequence.position(first + quad_row()), sequence.position(first + quad_row() + 8)},
        common_begin_(p.window > 0 ? sequence.position(first + larger(rows_, 1) - 1) - p.window + 1 : 0),
        common_end_(sequence.position(first) + 1),
        key_scale_(operand_scale(p.key_scales, kv_head)) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Row at(p, sequence, kv_head, first + quad_row() + 8 * row);
      index_[row] = static_cast<int32_t>(at.index(p));
      if (quad_row() + 8 * row < rows_) load_query(row, at);
    }
  }

  DEVICE bool sees_slice(int key) const { return rows_ > 0 && visible_.touches(key, kSliceKeys); }

  // Takes in the 16 keys from position `key` on, which lie in slice `slice` of the stage.
  DEVICE void attend(const Ring& ring, int stage, int slice, int key) {
    float s[2][4] = {};  // keys 0-7 and 8-15 of the slice
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      ring.load_keys(b, stage, slice, step);
      mma(s[0], query_[step], b[0], b[1], Product{});
      mma(s[1], query_[step], b[2], b[3], Product{});
    }
    scale_and_mask(s, key);
    weigh(s, 0, key);
    weigh(s, 1, key);
    uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = pack(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1], Product{});
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      ring.load_values(b, stage, slice, step);
      mma(out_[2 * step], weights, b[0], b[1], Product{});
      mma(out_[2 * step + 1], weights, b[2], b[3], Product{});
    }
  }

  // The part of softmax and output that these keys make up: row r at part + r * (kStateFloats + kHeadSize).
  DEVICE void write_part(float* part, int kv_head) {
    const float value_scale = operand_scale(p_.value_scales, kv_head);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float* state = part + (quad_row() + 8 * row) * (kStateFloats + kHeadSize);
      const float l = quad_sum(l_[row]);
      if constexpr (Stats::kEnabled) stats_.sum_over_quad(row);
      if (quad_lane() == 0) {
        state[0] = m_[row];
        state[1] = l;
        if constexpr (Stats::kEnabled) stats_.write_state(row, state);
      }
#pragma unroll
      for (int n = 0; n < 2 * kSteps; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          state[kStateFloats + Ring::output_column(n, quad_lane(), i)] = out_[n][2 * row + i] * value_scale;
    }
  }

 private:
  DEVICE static int quad_row() { return thread_index() % kWarpSize / 4; }
  DEVICE static int quad_lane() { return thread_index() % 4; }
  // From products to scores in base 2. Only e4m3 spends a register on the keys' scale.
  DEVICE float score_scale() const {
    constexpr float kLog2E = 1.44269504088896341f;
    if constexpr (sizeof(Cache) == 1) return p_.scale * kLog2E * key_scale_;
    return p_.scale * kLog2E;
  }
  DEVICE static float operand_scale(const float* scales, int kv_head) {
    return Ring::kExpanded * (scales == nullptr ? 1.0f : scales[kv_head]);
  }

  DEVICE void load_query(int row, const Row& at) {
    const T* from = static_cast<const T*>(p_.query) + at.token * p_.query_token_stride + at.head * p_.query_head_stride;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t words[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        words[i] = *reinterpret_cast<const uint32_t*>(from + 16 * step + Ring::query_column(quad_lane(), i));
      Ring::arrange_query(words, T{});
      query_[step][row] = words[0];
      query_[step][row + 2] = words[1];
    }
  }

  DEVICE void scale_and_mask(float (&s)[2][4], int key) const {
    const uint32_t reach = p_.window > 0 ? p_.window : INT32_MAX;
    const bool all_visible = key >= common_begin_ && key + kSliceKeys <= common_end_;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[half][i] *= score_scale();
        const int at = key + 8 * half + 2 * quad_lane() + i % 2;
        // One comparison for both ends: later keys have a negative distance, which is a huge unsigned one.
        if (!all_visible && static_cast<uint32_t>(position_[i / 2] - at) >= reach) s[half][i] = kMasked;
      }
  }

  // Turns the scores of one row into weights 2^(s - m) and adds them to the row's sums.
  DEVICE void weigh(float (&s)[2][4], int row, int key) {
    const int i = 2 * row;
    const float top = quad_max(larger(larger(s[0][i], s[0][i + 1]), larger(s[1][i], s[1][i + 1])));
    if constexpr (Stats::kEnabled) stats_.add_largest(row, top);
    if (top > m_[row] + kLazyShift) move_shift(row, top);
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = i; j < i + 2; ++j) {
        const float d = s[half][j] - m_[row];
        s[half][j] = exp2(d);
        sum += s[half][j];
        if constexpr (Stats::kEnabled) stats_.add(row, s[half][j], d);
      }
    l_[row] += sum;
    if constexpr (Stats::kEnabled) add_masses(s, row, key, sum);
  }

  DEVICE void move_shift(int row, float m) {
    const float factor = exp2(m_[row] - m);
    if constexpr (Stats::kEnabled) stats_.rescale(row, factor, m_[row] - m, l_[row]);
    l_[row] *= factor;
    m_[row] = m;
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
      out_[n][2 * row] *= factor;
      out_[n][2 * row + 1] *= factor;
    }
  }

  DEVICE void add_masses(const float (&s)[2][4], int row, int key, float sum) {
    if (key < Stats::kSinkTokens || key + kSliceKeys > common_end_ - Stats::kRecentTokens) {
      const float weights[4] = {s[0][2 * row], s[0][2 * row + 1], s[1][2 * row], s[1][2 * row + 1]};
      stats_.add_edges(row, weights, key + 2 * quad_lane(), position_[row]);
    }
    if (p_.page_masses == nullptr) return;
    const float mass = quad_sum(sum);
    if (quad_lane() == 0 && quad_row() + 8 * row < rows_)
      p_.slice_masses[index_[row] * Stats::slices_per_row(p_) + key / kSliceKeys] = log2(mass) + m_[row];
  }

  const GpuParams& p_;
  const int rows_;
  const KeyRange visible_;  // by any row
  const int position_[2];
  int32_t index_[2];  // in the batch: token * Hq + head
  const int common_begin_, common_end_;  // keys that all rows see
  const float key_scale_;
  uint32_t query_[kSteps][4] = {};
  float out_[2 * kSteps][4] = {};
  float m_[2] = {kMasked, kMasked}, l_[2] = {};  // l covers the thread's own keys
  Stats stats_;
};

}  // namespace pagestream::gpu
