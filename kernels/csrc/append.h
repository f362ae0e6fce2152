// What lies between the projections of a token and its attention: RMS norm of query and key heads where the model has
// one, rotation, and storing. In float32, rounded once.
#pragma once

#include <cmath>

#include "store_kv.h"

namespace {

struct AppendParams {
  void* heads;                    // [T, Hq + 2 Hkv, D]: query, key, value; the query is replaced
  const float *cos, *signed_sin;  // [T, D]
  const void* norm_weight;        // [Hq + Hkv, D] or null, in the type of heads
  float epsilon;
  int64_t token_stride, head_stride;
  int32_t num_heads, num_kv_heads, head_size;
};

// One head to float32, normalised and rotated: dimension i becomes x_i cos_i + x_j signed_sin_i, j = (i + D/2) mod D.
template <typename T>
void rotate_head(const AppendParams& p, const T* from, const T* norm_weight, const float* cos, const float* signed_sin,
                 float* __restrict x, float* __restrict to) {
  const int32_t size = p.head_size, half = size / 2;
  for (int32_t i = 0; i < size; ++i) x[i] = to_float(from[i]);
  if (norm_weight != nullptr) {
    float squares = 0;
    for (int32_t i = 0; i < size; ++i) squares += x[i] * x[i];
    const float factor = 1 / std::sqrt(squares / static_cast<float>(size) + p.epsilon);
    for (int32_t i = 0; i < size; ++i) x[i] *= factor * to_float(norm_weight[i]);
  }
  for (int32_t i = 0; i < half; ++i) to[i] = x[i] * cos[i] + x[i + half] * signed_sin[i];
  for (int32_t i = half; i < size; ++i) to[i] = x[i] * cos[i] + x[i - half] * signed_sin[i];
}

// Replaces the query heads of a token; `keys` [Hkv, D] receives its key heads; `scratch` [2, D].
template <typename T>
void rotate_token(const AppendParams& p, int64_t token, float* keys, float* scratch) {
  const float *cos = p.cos + token * p.head_size, *signed_sin = p.signed_sin + token * p.head_size;
  for (int64_t head = 0; head < p.num_heads + p.num_kv_heads; ++head) {
    T* from = static_cast<T*>(p.heads) + token * p.token_stride + head * p.head_stride;
    const T* weight = p.norm_weight == nullptr ? nullptr : static_cast<const T*>(p.norm_weight) + head * p.head_size;
    const bool is_key = head >= p.num_heads;
    float* to = is_key ? keys + (head - p.num_heads) * p.head_size : scratch + p.head_size;
    rotate_head(p, from, weight, cos, signed_sin, scratch, to);
    if (is_key) continue;
    for (int32_t i = 0; i < p.head_size; ++i) from_float(to[i], from[i]);
  }
}

using RotateToken = void (*)(const AppendParams&, int64_t token, float* keys, float* scratch);

inline RotateToken rotate_token_for(pagestream::DType heads) {
  constexpr RotateToken kRotate[3] = {rotate_token<float>, rotate_token<BFloat16>, rotate_token<Float16>};
  return kRotate[static_cast<int>(heads)];
}

}  // namespace
