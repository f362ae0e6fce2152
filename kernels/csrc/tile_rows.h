// What all kinds of operands share: memory, a row's query, and its weights from its scores.
#pragma once

#include "amx.h"
#include "rows.h"

namespace {

constexpr int kSplit = kTile * kTilesPerSplit;  // keys
constexpr int kPanel = 16;                      // rows of a tile register
constexpr int kScoreRow = kSplit + kPanel;      // powers of two share few cache sets
constexpr TileShape kFull{kPanel, 64};

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out arrays, each on a cache line of its own.
struct Arena {
  float* next;

  template <typename T>
  void take(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(next);
    next += (count * int64_t{sizeof(T)} + 63) / 64 * (64 / int64_t{sizeof(float)});
  }
};

// Into L2, a kilobyte of what is read a tile later: in small portions, so that reading never waits for computing.
inline void prefetch(const void* start) {
  for (int byte = 0; byte < 1024; byte += 64) __builtin_prefetch(static_cast<const char*>(start) + byte, 0, 2);
}

inline void configure_many() { configure_tiles({kFull, kFull, kFull, kFull, kFull, kFull, kFull, kFull}); }

inline int64_t most_rows(const AttentionParams& p) {
  return round_up(max(kMaxRowsPerBlock, group_size(p)), 2 * kPanel);
}

// Numbers of kColumns vectors, 16 keys after one another with kColumns rows each, become kColumns rows of 16 keys. Each
// round moves the lowest bit of an element's place to the top.
template <int kColumns>
inline void split_columns(Float (&x)[kColumns]) {
  const Int kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, kOdd = kEven + 1;
  for (int round = 1; round < kColumns; round *= 2) {
    Float next[kColumns];
    for (int i = 0; i < kColumns / 2; ++i) {
      next[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], kEven);
      next[i + kColumns / 2] = __builtin_shuffle(x[2 * i], x[2 * i + 1], kOdd);
    }
    for (int i = 0; i < kColumns; ++i) x[i] = next[i];
  }
}

// For a few rows: tile 0 for the scores of 16 keys and 1 for the query's columns, 2 to 5 for outputs and 7 for weights,
// 6 for keys and values.
template <int kColumns>
inline void configure_few() {
  constexpr TileShape kScores{kPanel, kColumns * sizeof(float)}, kRows{kColumns, kFull.bytes_per_row};
  configure_tiles({kScores, kScores, kRows, kRows, kRows, kRows, kFull, kRows});
}

// Calls split(numbers) with the query head of a row, in its type.
template <typename Split>
inline auto with_query(const AttentionParams& p, const Row& row, Split split) {
  const int64_t at = row.token * p.query_token_stride + row.head * p.query_head_stride;
  switch (p.query_dtype) {
    case DType::kBFloat16: return split(static_cast<const BFloat16*>(p.query) + at);
    case DType::kFloat16: return split(static_cast<const Float16*>(p.query) + at);
    default: return split(static_cast<const float*>(p.query) + at);
  }
}

inline float sign_of_scale(const AttentionParams& p) { return (p.scale > 0) - (p.scale < 0); }

// The scores of one row become weights 2^(c (s - m)), of which keep(j, weights) gets 32 at a time and, with statistics,
// the scores' place all; keys outside [lo, hi) get 0, up to `count`, a multiple of 64. Sums run in two chains over
// vectors counted from the split's start.
template <bool kWithStats, typename Keep>
inline Softmax weigh(float* scores, int lo, int hi, int count, float c, Keep keep) {
  for (int j = 0; (lo > 0 || hi < count) && j < count; j += kLanes) {
    const Int key = lane_index() + j;
    store(scores + j, (key >= lo) & (key < hi) ? load(scores + j) : broadcast(-INFINITY));
  }
  Float highest[4];
  for (int i = 0; i < 4; ++i) highest[i] = load(scores + i * kLanes);
  for (int j = kTile; j < count; j += kTile)
    for (int i = 0; i < 4; ++i) highest[i] = max(load(scores + j + i * kLanes), highest[i]);
  const float m = max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
  Float l[2] = {}, u[2] = {};
  for (int j = 0; j < count; j += 2 * kLanes) {
    Float weight[2];
    for (int half = 0; half < 2; ++half) {
      const Float d = (load(scores + j + half * kLanes) - m) * c;
      weight[half] = exp2(d);
      l[half] += weight[half];
      if constexpr (kWithStats) {
        u[half] = fma(weight[half], clamp_exponent(d), u[half]);
        store(scores + j + half * kLanes, weight[half]);
      }
    }
    keep(j, weight);
  }
  Softmax state;
  state.m = m * c;
  state.l = sum(l[0] + l[1]);
  if constexpr (kWithStats) state.u = sum(u[0] + u[1]);
  return state;
}

}  // namespace
