// The dot product of a group: unsigned codes with 12-bit integers, 16 * coarse + fine, both signed bytes.
#pragma once

#include "vec.h"

namespace {

typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));

constexpr int kQuads = 8;            // a group of 32, four inputs in each 32-bit lane
constexpr int kFine = 4 * kQuads;    // where the fine bytes of a group begin
constexpr int kFineBits = 4;

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

template <int kBits>
inline Int dot_group(const Bytes (&codes)[kQuads], const int8_t* x) {
  __m512i coarse{}, fine{};
  for (int q = 0; q < kQuads; ++q) {
    coarse = _mm512_dpbusd_epi32(coarse, (__m512i)codes[q], (__m512i)broadcast_quad(x + 4 * q));
    fine = _mm512_dpbusd_epi32(fine, (__m512i)codes[q], (__m512i)broadcast_quad(x + 4 * q + kFine));
  }
  return ((Int)coarse << kFineBits) + (Int)fine;
}

#elif defined(__SSSE3__)

typedef int16_t Shorts __attribute__((vector_size(kLanes * 4)));

#if defined(__AVX2__)
inline Shorts multiply_pairs(Bytes codes, Bytes x) { return (Shorts)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x); }
inline Int add_pairs(Shorts sums, int16_t factor) {
  return (Int)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(factor));
}
#else
inline Shorts multiply_pairs(Bytes codes, Bytes x) { return (Shorts)_mm_maddubs_epi16((__m128i)codes, (__m128i)x); }
inline Int add_pairs(Shorts sums, int16_t factor) { return (Int)_mm_madd_epi16((__m128i)sums, _mm_set1_epi16(factor)); }
#endif

// Half a byte of a code at a time: 16 bits hold the sum of 8 x 2 products of 15 and 127, not one of 255 and 127.
template <int kBits>
inline Int dot_group(const Bytes (&codes)[kQuads], const int8_t* x) {
  Int sum{};
  for (int shift = 0; shift < kBits; shift += 4) {
    Shorts coarse{}, fine{};
    for (int q = 0; q < kQuads; ++q) {
      const Bytes half = kBits == 4 ? codes[q] : (Bytes)((UInt)codes[q] >> shift) & 15;
      coarse += multiply_pairs(half, broadcast_quad(x + 4 * q));
      fine += multiply_pairs(half, broadcast_quad(x + 4 * q + kFine));
    }
    sum += add_pairs(coarse, 1 << (shift + kFineBits)) + add_pairs(fine, 1 << shift);
  }
  return sum;
}

#else

template <int kBits>
inline Int dot_group(const Bytes (&codes)[kQuads], const int8_t* x) {
  Int sum{};
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4 * kQuads; ++i)
      sum[lane] += codes[i / 4][4 * lane + i % 4] * ((x[i] * (1 << kFineBits)) + x[i + kFine]);
  return sum;
}

#endif

}  // namespace
