// Copies new keys or values into their slots of the paged cache, converting when the types differ. Int8 caches hold
// x / scale, rounded to nearest even, with scale = max |x| / 127 for each row and head.
#pragma once

#include "dtype.h"
#include "params.h"

namespace {

struct StoreParams {
  const void* rows;  // [T, Hkv, D]
  void* cache;       // [P, Hkv, B, D]
  const int64_t* slots;
  int64_t row_token_stride, row_head_stride, page_stride, head_stride;
  int32_t num_kv_heads, head_size, page_size;
  float* scales;  // [P, Hkv, B] of an int8 cache, else null
  int64_t scale_page_stride, scale_head_stride;
};

template <typename From, typename To>
inline void store_row(const From* from, int size, To* to, float* /*scale*/) {
  for (int d = 0; d < size; ++d) from_float(to_float(from[d]), to[d]);
}

// A NaN or infinity makes the scale one, and with it all that is computed from the row.
template <typename From>
inline void store_row(const From* from, int size, int8_t* to, float* scale) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  constexpr float kLeast = 1e-36f;       // below it 127 / x is no float: the row counts as 0
  int32_t bits = 0;                      // of absolute values; they are ordered as the values are, NaN above all
  for (int d = 0; d < size; ++d) {
    const int32_t magnitude = bits_of(to_float(from[d])) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  const float largest = from_bits(bits), inverse = largest >= kLeast ? 127.0f / largest : 0.0f;
  *scale = largest / 127.0f;
  for (int d = 0; d < size; ++d) to[d] = static_cast<int8_t>(bits_of(to_float(from[d]) * inverse + kRound));
}

template <typename From, typename To>
void store_token(const StoreParams& p, int64_t token) {
  const int64_t page = p.slots[token] / p.page_size, offset = p.slots[token] % p.page_size;
  for (int64_t head = 0; head < p.num_kv_heads; ++head) {
    const From* from = static_cast<const From*>(p.rows) + token * p.row_token_stride + head * p.row_head_stride;
    To* to = static_cast<To*>(p.cache) + page * p.page_stride + head * p.head_stride + offset * p.head_size;
    float* scale = nullptr;
    if (p.scales != nullptr) scale = p.scales + page * p.scale_page_stride + head * p.scale_head_stride + offset;
    store_row(from, p.head_size, to, scale);
  }
}

using StoreToken = void (*)(const StoreParams&, int64_t token);

inline StoreToken store_token_for(pagestream::DType from, pagestream::DType to) {
  constexpr StoreToken kStore[3][4] = {
      {store_token<float, float>, store_token<float, BFloat16>, store_token<float, Float16>, store_token<float, int8_t>},
      {store_token<BFloat16, float>, store_token<BFloat16, BFloat16>, store_token<BFloat16, Float16>,
       store_token<BFloat16, int8_t>},
      {store_token<Float16, float>, store_token<Float16, BFloat16>, store_token<Float16, Float16>,
       store_token<Float16, int8_t>}};
  return kStore[static_cast<int>(from)][static_cast<int>(to)];
}

}  // namespace
