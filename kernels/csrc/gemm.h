// C[rows, n] (+)= A[rows, depth] B[depth, n] in float32, for blocks that live in the first-level caches; B may be of a
// storage type. Every element is one chain of fused multiply-adds in the order of depth, however the rows are grouped:
// a row's bits do not depend on which rows are computed beside it.
#pragma once

#include "vec.h"

namespace {

constexpr int kBlockRows = 6;
constexpr int kBlockVectors = kLanes == 16 ? 4 : 2;  // 6 x 4 accumulators of 32 registers, or 6 x 2 of 16

template <int kRows, int kVectors, typename B>
inline void gemm_block(const float* a, int lda, const B* b, int ldb, float* c, int ldc, int depth, bool accumulate) {
  Float acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : Float{};
  for (int k = 0; k < depth; ++k) {
    Float row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load_wide(b + k * ldb + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Float x = broadcast(a[r * lda + k]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, row[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

// All row groups of one panel of kVectors columns.
template <int kVectors, int kRows = kBlockRows, typename B>
void gemm_panel(const float* a, int lda, const B* b, int ldb, float* c, int ldc, int rows, int depth,
                bool accumulate) {
  for (; rows >= kRows; rows -= kRows, a += kRows * lda, c += kRows * ldc)
    gemm_block<kRows, kVectors>(a, lda, b, ldb, c, ldc, depth, accumulate);
  if constexpr (kRows > 1) gemm_panel<kVectors, kRows - 1>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
}

// n is a multiple of kLanes.
template <int kVectors = kBlockVectors, typename B>
void gemm(const float* a, int lda, const B* b, int ldb, float* c, int ldc, int rows, int n, int depth,
          bool accumulate) {
  for (; n >= kVectors * kLanes; n -= kVectors * kLanes, b += kVectors * kLanes, c += kVectors * kLanes)
    gemm_panel<kVectors>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
  if constexpr (kVectors > 1) gemm<kVectors - 1>(a, lda, b, ldb, c, ldc, rows, n, depth, accumulate);
}

}  // namespace
