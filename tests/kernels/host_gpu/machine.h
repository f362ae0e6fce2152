// The machine of kernels/csrc/cuda/device/machine.h, executed on a CPU: what the CUDA kernels ask for, with its exact
// meaning and none of its timing. A block's threads are fibres. A warp's lanes run one after the other, in random
// order, up to the next warp operation, barrier or end; there they must all meet. Whatever is left open by the rules is
// made as hostile as the rules allow: shared memory starts as NaN, an asynchronous copy leaves NaN until it lands,
// which is at once or at the wait that covers it, by the toss of a coin, and blocks run in random order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "dtype.h"

#define DEVICE inline

namespace pagestream::gpu {

using ::BFloat16;
using ::Float16;
using ::from_float;
using ::to_float;

struct Float8 {  // e4m3
  uint8_t bits;
};

// To nearest even, at most 448; NaN stays NaN.
inline void from_float(float x, Float8& to) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) {
    to.bits = sign | 0x7f;
    return;
  }
  const float magnitude = std::fmin(std::fabs(x), 448.0f);
  int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);  // subnormals keep the spacing of 2^-6
  auto eighths = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  if (eighths == 16) {
    eighths = 8;
    ++exponent;
  }
  to.bits = static_cast<uint8_t>(sign | (eighths < 8 ? eighths : (exponent + 7) << 3 | (eighths - 8)));
}

constexpr int kWarpSize = 32;

// Runs kernel(shared) in every thread of every block. Exits with a message when lanes of a warp meet at different
// places.
using Kernel = std::function<void(unsigned char* shared)>;
void launch(int num_blocks, int num_threads, size_t shared_bytes, uint32_t seed, const Kernel& kernel);

int thread_index();
int block_index();
void block_barrier();
void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int pending);

// What a lane brings to a warp operation and takes away; the operation runs once all lanes have arrived.
using WarpOperation = void (*)(void* const* lanes);
void meet(WarpOperation operation, void* lane);

template <int kPending>
void wait_copies() {
  wait_for_copies(kPending);
}

inline void warp_barrier() {
  meet([](void* const*) {}, nullptr);
}

template <typename T>
T shuffle_xor(T value, int mask) {
  struct Lane {
    T value, result;
    int mask;
  } lane{value, {}, mask};
  meet(
      [](void* const* lanes) {
        for (int i = 0; i < kWarpSize; ++i) {
          Lane& me = *static_cast<Lane*>(lanes[i]);
          me.result = static_cast<Lane*>(lanes[i ^ me.mask])->value;
        }
      },
      &lane);
  return lane.result;
}

inline float exp2(float x) { return x < -126 ? 0.0f : std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float larger(float a, float b) { return std::fmax(a, b); }

inline int32_t arrive(int32_t* counter) { return (*counter)++; }  // blocks run one after the other

struct MatrixLane {
  uint32_t* result;
  const uint16_t* row;
};

template <int kMatrices, bool kTransposed>
void load_matrices_operation(void* const* lanes) {
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    uint16_t element[8][8];
    for (int row = 0; row < 8; ++row) {
      const uint16_t* from = static_cast<MatrixLane*>(lanes[matrix * 8 + row])->row;
      if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
        std::fputs("matrix row not aligned to 16 bytes\n", stderr);
        std::exit(3);
      }
      std::memcpy(element[row], from, 16);
    }
    for (int i = 0; i < kWarpSize; ++i) {
      const int row = i / 4, column = i % 4 * 2;
      const uint32_t low = kTransposed ? element[column][row] : element[row][column];
      const uint32_t high = kTransposed ? element[column + 1][row] : element[row][column + 1];
      static_cast<MatrixLane*>(lanes[i])->result[matrix] = low | high << 16;
    }
  }
}

template <int kMatrices>
void load_matrices(uint32_t (&r)[kMatrices], const void* shared_row) {
  MatrixLane lane{r, static_cast<const uint16_t*>(shared_row)};
  meet(load_matrices_operation<kMatrices, false>, &lane);
}
template <int kMatrices>
void load_matrices_transposed(uint32_t (&r)[kMatrices], const void* shared_row) {
  MatrixLane lane{r, static_cast<const uint16_t*>(shared_row)};
  meet(load_matrices_operation<kMatrices, true>, &lane);
}

struct MmaLane {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * which)});
}

// The products are exact in float32; they are added in float64 and rounded once.
template <typename T>
void mma_operation(void* const* lanes) {
  double a[16][16], b[16][8];
  for (int i = 0; i < kWarpSize; ++i) {
    const MmaLane& lane = *static_cast<MmaLane*>(lanes[i]);
    const int g = i / 4, q = i % 4;
    for (int r = 0; r < 4; ++r)
      for (int e = 0; e < 2; ++e) a[g + r % 2 * 8][2 * q + e + r / 2 * 8] = half_of<T>(lane.a[r], e);
    for (int r = 0; r < 2; ++r)
      for (int e = 0; e < 2; ++e) b[2 * q + e + r * 8][g] = half_of<T>(lane.b[r], e);
  }
  for (int i = 0; i < kWarpSize; ++i) {
    float* c = static_cast<MmaLane*>(lanes[i])->c;
    for (int r = 0; r < 4; ++r) {
      const int row = i / 4 + r / 2 * 8, column = i % 4 * 2 + r % 2;
      double sum = c[r];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      c[r] = static_cast<float>(sum);
    }
  }
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  MmaLane lane{c, a, {b0, b1}};
  meet(mma_operation<T>, &lane);
}

template <typename T>
uint32_t pack(float low, float high, T) {
  T both[2];
  from_float(low, both[0]);
  from_float(high, both[1]);
  return both[0].bits | static_cast<uint32_t>(both[1].bits) << 16;
}

}  // namespace pagestream::gpu
