// The softmax statistics as a policy of the attention kernel: definitions in ../softmax.h and kernels/README.md.
#pragma once

#include "softmax.h"

namespace pagestream::gpu {

class MergedStatistics;

// Of a thread's two query rows. u, sink and recent cover the thread's own keys until sum_over_quad.
struct Statistics {
  static constexpr bool kEnabled = true;
  static constexpr int kSinkTokens = 4;
  static constexpr int kRecentTokens = 64;
  using Merged = MergedStatistics;

  float u[2] = {}, sink[2] = {}, recent[2] = {};
  float largest[2] = {kMasked, kMasked};  // the shift m may stay below it (lazy rescaling)

  DEVICE void rescale(int row, float factor, float shift, float l) {
    u[row] = factor * fma(shift, l, u[row]);
    sink[row] *= factor;
    recent[row] *= factor;
  }

  DEVICE void add_largest(int row, float x) { largest[row] = larger(largest[row], x); }
  DEVICE void add(int row, float weight, float d) { u[row] = fma(weight, d, u[row]); }

  // Weights of keys `key`, `key + 1`, `key + 8`, `key + 9`, in a slice that holds the first or the latest tokens.
  DEVICE void add_edges(int row, const float (&weights)[4], int key, int position) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = key + i % 2 + i / 2 * 8;
      sink[row] += at < kSinkTokens ? weights[i] : 0.0f;
      recent[row] += at > position - kRecentTokens ? weights[i] : 0.0f;
    }
  }

  DEVICE void sum_over_quad(int row) {
    u[row] = quad_sum(u[row]);
    sink[row] = quad_sum(sink[row]);
    recent[row] = quad_sum(recent[row]);
  }

  DEVICE void write_state(int row, float* state) const {
    state[2] = u[row];
    state[3] = largest[row];
    state[4] = sink[row];
    state[5] = recent[row];
  }

  DEVICE static int64_t slices_per_row(const GpuParams& p) {
    return int64_t{p.max_pages} * p.page_size / kSliceKeys;
  }
};

// The statistics of one row, merged from its parts by all lanes of a warp alike.
class MergedStatistics {
 public:
  DEVICE void add(const float* state, float weight, float shift) {
    u_ = fma(weight, fma(shift, state[1], state[2]), u_);
    largest_ = larger(largest_, state[3]);
    sink_ = fma(weight, state[4], sink_);
    recent_ = fma(weight, state[5], recent_);
  }

  DEVICE void write_state(float* state) const {
    state[2] = u_;
    state[3] = largest_;
    state[4] = sink_;
    state[5] = recent_;
  }

  DEVICE void write(const GpuParams& p, const Row& at, float m, float l) const {
    const int64_t row = at.index(p);
    constexpr float kLn2 = 0.693147180559945309f;
    const float log_sum = m + log2(l);
    const int lane = thread_index() % kWarpSize;
    if (p.stats != nullptr && lane == 0) {
      float* stats = p.stats + row * 5;
      stats[0] = kLn2 * log_sum;
      stats[1] = kLn2 * (log2(l) - u_ / l);
      stats[2] = exp2(largest_ - m) / l;
      stats[3] = sink_ / l;
      stats[4] = recent_ / l;
    }
    if (p.page_masses == nullptr) return;
    const float* slices = p.slice_masses + row * Statistics::slices_per_row(p);
    const int per_page = p.page_size / kSliceKeys, first = at.first_key / kSliceKeys, last = at.position / kSliceKeys;
    for (int page = lane; page < p.max_pages; page += kWarpSize) {
      float mass = 0;
      const int end = smaller((page + 1) * per_page, last + 1);
      for (int slice = larger(page * per_page, first); slice < end; ++slice) mass += exp2(slices[slice] - log_sum);
      p.page_masses[row * p.max_pages + page] = mass;
    }
  }

 private:
  float u_ = 0, largest_ = kMasked, sink_ = 0, recent_ = 0;
};

}  // namespace pagestream::gpu
