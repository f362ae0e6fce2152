// Copies new keys or values into their slots of the paged cache, converting when the types differ.
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
};

template <typename From, typename To>
void store_token(const StoreParams& p, int64_t token) {
  const int64_t page = p.slots[token] / p.page_size, offset = p.slots[token] % p.page_size;
  for (int64_t head = 0; head < p.num_kv_heads; ++head) {
    const From* from = static_cast<const From*>(p.rows) + token * p.row_token_stride + head * p.row_head_stride;
    To* to = static_cast<To*>(p.cache) + page * p.page_stride + head * p.head_stride + offset * p.head_size;
    for (int d = 0; d < p.head_size; ++d) from_float(to_float(from[d]), to[d]);
  }
}

using StoreToken = void (*)(const StoreParams&, int64_t token);

inline StoreToken store_token_for(pagestream::DType from, pagestream::DType to) {
  constexpr StoreToken kStore[3][3] = {
      {store_token<float, float>, store_token<float, BFloat16>, store_token<float, Float16>},
      {store_token<BFloat16, float>, store_token<BFloat16, BFloat16>, store_token<BFloat16, Float16>},
      {store_token<Float16, float>, store_token<Float16, BFloat16>, store_token<Float16, Float16>}};
  return kStore[static_cast<int>(from)][static_cast<int>(to)];
}

}  // namespace
