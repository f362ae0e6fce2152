// Storage types and their conversion to and from float32 (round to nearest even, NaN stays NaN).
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  // A half's exponent and mantissa, moved up and read as float32, are 2^112 too small, subnormals included.
  const float magnitude = from_bits((x.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return from_bits(bits_of(magnitude) | special | (x.bits & 0x8000u) << 16);
}

inline void from_float(float x, float& to) { to = x; }

inline void from_float(float x, BFloat16& to) {
  const uint32_t bits = bits_of(x);
  to.bits = x != x ? 0x7fc0 : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline void from_float(float x, Float16& to) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // subnormal: the float adder rounds at the right bit
    half = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
