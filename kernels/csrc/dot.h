// The integer dot instructions: 4 products of an unsigned and a signed byte, summed into each 32-bit lane.
#pragma once

#include "vec.h"

namespace {

typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));

inline Bytes load_bytes(const uint8_t* p) {
  Bytes x;
  memcpy(&x, p, sizeof x);
  return x;
}

// The same four bytes in every lane.
inline Bytes broadcast_quad(const int8_t* p) {
  int32_t quad;
  memcpy(&quad, p, sizeof quad);
  return (Bytes)(quad - Int{});
}

#if defined(__AVX512VNNI__)

// 8-bit codes are stored plus 128: the dot product of what is stored is corrected by starting from -128 sum(x).
template <int kBits>
inline Int start_dot(int32_t x_sum) {
  return (kBits == 8 ? -128 * x_sum : 0) - Int{};
}

template <int kBits>
inline Int dot4(Int sum, Bytes codes, Bytes x) {
  return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
}

#else

template <int kBits>
inline Int start_dot(int32_t) {
  return Int{};
}

// Pairs of products are summed in 16 bits, which holds 2 x 128 x 127 but not 2 x 255 x 127: the codes get their sign
// back and hand it to x.
template <int kBits>
inline Int dot4(Int sum, Bytes codes, Bytes x) {
#if defined(__AVX2__)
  __m256i unsigned_codes = (__m256i)codes, signed_x = (__m256i)x;
  if constexpr (kBits == 8) {
    const __m256i signed_codes = (__m256i)(codes ^ 128);
    unsigned_codes = _mm256_abs_epi8(signed_codes);
    signed_x = _mm256_sign_epi8(signed_x, signed_codes);
  }
  return sum + (Int)_mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_codes, signed_x), _mm256_set1_epi16(1));
#elif defined(__SSSE3__)
  __m128i unsigned_codes = (__m128i)codes, signed_x = (__m128i)x;
  if constexpr (kBits == 8) {
    const __m128i signed_codes = (__m128i)(codes ^ 128);
    unsigned_codes = _mm_abs_epi8(signed_codes);
    signed_x = _mm_sign_epi8(signed_x, signed_codes);
  }
  return sum + (Int)_mm_madd_epi16(_mm_maddubs_epi16(unsigned_codes, signed_x), _mm_set1_epi16(1));
#else
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) sum[lane] += (codes[i] - (kBits == 8 ? 128 : 0)) * (int8_t)x[i];
  return sum;
#endif
}

#endif

}  // namespace
