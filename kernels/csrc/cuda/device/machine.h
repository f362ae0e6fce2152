// What kernels may ask of the machine: the only file with PTX. Kernel headers say `#include <machine.h>`; the include
// path decides between this file and tests/kernels/host_gpu/machine.h, which executes the same kernels on a CPU. So no
// kernel needs an #ifdef, and what runs without a GPU is the very source that is compiled for one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__

namespace pagestream::gpu {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;
struct Float8 {  // e4m3
  uint8_t bits;
};

constexpr int kWarpSize = 32;

// Blocks that a multiprocessor should hold at once; caps registers at 65536 / (128 threads x blocks). Before sm_90
// shared memory has room for two at most.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kBlocksPerMultiprocessor = 3;
#else
constexpr int kBlocksPerMultiprocessor = 2;
#endif

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

template <typename T>
DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Relative error 2^-22; 0 below the smallest normal number.
DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2(float x) { return ::log2f(x); }
DEVICE float fma(float a, float b, float c) { return ::__fmaf_rn(a, b, c); }
DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }

// One more arrival at a counter that blocks share; returns the arrivals before it. Everything the block wrote before
// a barrier that precedes the call is visible to the blocks that arrive later (release and acquire in one).
DEVICE int32_t arrive(int32_t* counter) {
  int32_t before;
  asm volatile("fence.acq_rel.gpu;\n\tatom.acq_rel.gpu.global.add.s32 %0, [%1], 1;\n\tfence.acq_rel.gpu;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// 16 bytes from global to shared memory, both 16-byte aligned; zeros, and no read, when not `valid`.
DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns once all but the latest kPending groups of this thread's copies are done. A barrier shows them to others.
template <int kPending>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four or two 8x8 matrices of 16-bit elements. Lane i passes the address of row i % 8 of matrix i / 8 (of two: lanes 16
// to 31 pass any) and receives, of each matrix, elements 2 (lane % 4) and the next one of row lane / 4, transposed: of
// column lane / 4.
DEVICE void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
DEVICE void load_matrices(uint32_t (&r)[2], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(from)
               : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&r)[2], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(from)
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8]. Lane holds, with g = lane / 4 and q = lane % 4: c = (g, 2q), (g, 2q + 1), (g + 8,
// 2q), (g + 8, 2q + 1); a = pairs from (g, 2q), (g + 8, 2q), (g, 2q + 8), (g + 8, 2q + 8); b0, b1 = pairs from (2q, g),
// (2q + 8, g).
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to nearest even into one register, the first in the low half.
DEVICE uint32_t pack(float low, float high, BFloat16) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
DEVICE uint32_t pack(float low, float high, Float16) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
DEVICE float to_float(Float16 x) { return __half2float(x); }
DEVICE void from_float(float x, float& to) { to = x; }
DEVICE void from_float(float x, BFloat16& to) { to = __float2bfloat16_rn(x); }
DEVICE void from_float(float x, Float16& to) { to = __float2half_rn(x); }
DEVICE void from_float(float x, Float8& to) { to.bits = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

}  // namespace pagestream::gpu
