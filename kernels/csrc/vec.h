// One vector of float32 per instruction set, and what attention needs of it. Everything is in an unnamed namespace:
// a symbol shared between objects built for different instruction sets could be resolved to the wrong one.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Float __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UInt __attribute__((vector_size(kLanes * 4)));
typedef uint16_t UShort __attribute__((vector_size(kLanes * 2)));
typedef int8_t Byte __attribute__((vector_size(kLanes)));

inline Float load(const float* p) {
  Float x;
  memcpy(&x, p, sizeof x);
  return x;
}

// Loads that widen a storage type to float32.
inline Float load_wide(const float* p) { return load(p); }

inline Float load_wide(const BFloat16* p) {
#if defined(__AVX512F__)  // GCC widens in halves
  return (Float)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
  UShort x;
  memcpy(&x, p, sizeof x);
  return (Float)(__builtin_convertvector(x, UInt) << 16);
#endif
}

inline Float load_wide(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Float x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

inline Float load_wide(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Byte x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(__builtin_convertvector(x, Int), Float);
#endif
}

inline void store(float* p, Float x) { memcpy(p, &x, sizeof x); }

inline void store(BFloat16* p, Float x) {
  const UInt bits = (UInt)x, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const UShort narrow = __builtin_convertvector(x == x ? rounded : rounded * 0 + 0x7fc0u, UShort);
  memcpy(p, &narrow, sizeof narrow);
}

inline Float broadcast(float x) { return x - Float{}; }

// Explicit, and -ffp-contract=off elsewhere: the compiler may not choose to fuse in one instance of a template and
// not in another, because outputs with and without statistics must have the same bits.
inline Float fma(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Int lane_index() {
#if defined(__AVX512F__)
  return Int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return Int{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return Int{0, 1, 2, 3};
#endif
}

// b where either is NaN.
inline Float max(Float a, Float b) {
#if defined(__AVX512F__)  // GCC compares and blends
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Folds the upper half of the lanes onto the lower, until one is left: a fixed order.
template <typename Combine>
inline float reduce(Float x, Combine combine) {
#if defined(__AVX512F__)
  x = combine(x, __builtin_shuffle(x, lane_index() ^ 8));
#endif
#if defined(__AVX2__)
  x = combine(x, __builtin_shuffle(x, lane_index() ^ 4));
#endif
  x = combine(x, __builtin_shuffle(x, lane_index() ^ 2));
  x = combine(x, __builtin_shuffle(x, lane_index() ^ 1));
  return x[0];
}

inline float sum(Float x) {
  return reduce(x, [](Float a, Float b) { return a + b; });
}

inline float max(Float x) {
  return reduce(x, [](Float a, Float b) { return max(a, b); });
}

constexpr float kMinExponent = -125.0f;  // below it 2^x counts as 0; keeps results out of the denormals

// 2^x for x in [kMinExponent, 0], to 4 ulp; 1 for 0; 0 at kMinExponent; NaN for NaN. The polynomial interpolates
// (2^f - 1) / f at the Chebyshev nodes of [-1/2, 1/2]; its relative error is 5e-9. With AVX-512 x may be any number, f is
// in [0, 1) and the relative error 2e-7.
inline Float exp2(Float x) {
#if defined(__AVX512DQ__)
  const Float f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  Float p = broadcast(0.00178836874f);
  p = fma(p, f, broadcast(0.0091993876f));
  p = fma(p, f, broadcast(0.0556570544f));
  p = fma(p, f, broadcast(0.240207194f));
  p = fma(p, f, broadcast(0.693147568f));
  p = fma(p, f, broadcast(1.0f));
  const __mmask16 counts = _mm512_cmp_ps_mask(x, broadcast(kMinExponent), _CMP_NLE_UQ);
  return _mm512_maskz_scalef_ps(counts, p, x);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const Float shifted = x + kRound;
  const Float f = x - (shifted - kRound);
  Float p = broadcast(0.000154531634f);
  p = fma(p, f, broadcast(0.00133908633f));
  p = fma(p, f, broadcast(0.00961808302f));
  p = fma(p, f, broadcast(0.0555035695f));
  p = fma(p, f, broadcast(0.240226507f));
  p = fma(p, f, broadcast(0.693147182f));
  p = fma(p, f, broadcast(1.0f));
  const Float power = (Float)((UInt)p + ((UInt)shifted << 23));
  return x <= kMinExponent ? Float{} : power;
#endif
}

inline Float clamp_exponent(Float x) { return max(broadcast(kMinExponent), x); }

inline float exp2(float x) { return exp2(clamp_exponent(broadcast(x)))[0]; }

// x / (1 + e^-x), from the exponential of -|x|, which cannot overflow.
inline Float silu(Float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  const Float magnitude = x < 0 ? -x : x, e = exp2(clamp_exponent(magnitude * -kLog2E));
  return x * (x < 0 ? e : broadcast(1)) / (1 + e);
}

// Transposes a square of kLanes x kLanes: each round of interleaving rotates the bits of (row, column) by one.
inline void transpose(Float (&rows)[kLanes]) {
#if defined(__AVX512F__)
  const Int kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif defined(__AVX2__)
  const Int kLow = {0, 8, 1, 9, 2, 10, 3, 11};
#else
  const Int kLow = {0, 4, 1, 5};
#endif
  const Int kHigh = kLow + kLanes / 2;
  for (int round = 1; round < kLanes; round *= 2) {
    Float next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], kLow);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], kHigh);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace
