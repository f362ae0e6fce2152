// What lies between the projections of a layer and its attention, in one pass: RMS norm of query and key heads where
// the model has one, rotary embedding, storing keys and values in their slots, rounded to the cache's type. A warp per
// token and head; everything in float32, rounded once.
#pragma once

#include <machine.h>

#include "params.h"

namespace pagestream::gpu {

constexpr int kAppendThreads = 128;
constexpr int kMaxPairsPerLane = 4;  // head sizes up to 256

template <typename T, typename Cache>
class AppendWarp {
 public:
  DEVICE explicit AppendWarp(const AppendParams& p) : p_(p), lane_(thread_index() % kWarpSize), half_(p.head_size / 2) {
    const int64_t warp = (int64_t{block_index()} * kAppendThreads + thread_index()) / kWarpSize;
    const int heads = p.num_heads + 2 * p.num_kv_heads;
    token_ = warp / heads;
    head_ = static_cast<int>(warp % heads);
  }

  DEVICE void run() {
    if (token_ >= p_.num_tokens) return;
    T* from = static_cast<T*>(p_.heads) + token_ * p_.token_stride + head_ * p_.head_stride;
    for_each_pair([&](int i, int column) {
      low_[i] = to_float(from[column]);
      high_[i] = to_float(from[column + half_]);
    });
    const int first_value = p_.num_heads + p_.num_kv_heads;
    if (head_ < first_value && p_.norm_weight != nullptr) normalise();
    if (head_ < first_value) rotate();
    if (head_ < p_.num_heads) {
      write(from, 1);
    } else if (head_ < first_value) {
      store(p_.key_cache, p_.key_page_stride, p_.key_head_stride, p_.key_scales, head_ - p_.num_heads);
    } else {
      store(p_.value_cache, p_.value_page_stride, p_.value_head_stride, p_.value_scales, head_ - first_value);
    }
  }

 private:
  DEVICE void normalise() {
    float squares = 0;
    for_each_pair([&](int i, int) { squares = fma(low_[i], low_[i], fma(high_[i], high_[i], squares)); });
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
    const float factor = 1 / sqrtf(squares / p_.head_size + p_.epsilon);
    const T* weight = static_cast<const T*>(p_.norm_weight) + int64_t{head_} * p_.head_size;
    for_each_pair([&](int i, int column) {
      low_[i] *= factor * to_float(weight[column]);
      high_[i] *= factor * to_float(weight[column + half_]);
    });
  }

  DEVICE void rotate() {
    const float *cos = p_.cos + token_ * p_.head_size, *sin = p_.signed_sin + token_ * p_.head_size;
    for_each_pair([&](int i, int column) {
      const float low = low_[i], high = high_[i];
      low_[i] = fma(low, cos[column], high * sin[column]);
      high_[i] = fma(high, cos[column + half_], low * sin[column + half_]);
    });
  }

  DEVICE void store(void* cache, int64_t page_stride, int64_t head_stride, const float* scales, int kv_head) const {
    const int64_t slot = p_.slots[token_];
    if (slot < 0 || slot >= int64_t{p_.num_pages} * p_.page_size) return;
    Cache* to = static_cast<Cache*>(cache) + slot / p_.page_size * page_stride + kv_head * head_stride +
                slot % p_.page_size * p_.head_size;
    write(to, scales == nullptr ? 1 : scales[kv_head]);
  }

  template <typename To>
  DEVICE void write(To* to, float scale) const {
    for_each_pair([&](int i, int column) {
      from_float(low_[i] / scale, to[column]);
      from_float(high_[i] / scale, to[column + half_]);
    });
  }

  template <typename Use>
  DEVICE void for_each_pair(Use use) const {
#pragma unroll
    for (int i = 0; i < kMaxPairsPerLane; ++i)
      if (const int column = lane_ + i * kWarpSize; column < half_) use(i, column);
  }

  const AppendParams& p_;
  const int lane_, half_;
  int64_t token_;
  int head_;
  float low_[kMaxPairsPerLane], high_[kMaxPairsPerLane];  // dimensions i and i + D / 2, which rotate together
};

}  // namespace pagestream::gpu
