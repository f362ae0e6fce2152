// Products of a few query rows with int8 keys and values as they lie in their page: nothing of a cache is moved before
// it is multiplied. The integers are those of many rows (int8_products.h), and so are the bits.
#pragma once

#include "int8_products.h"

namespace {

constexpr int kFour = 4;              // rows that share a product: their parts are columns of one tile
constexpr int kFewAhead = 3 * kTile;  // keys and values are fetched so much ahead

// The sums of four keys, [key][part, row] of 16, as a vector [key, row].
inline Float add_query_parts(const int32_t* sums) {
  __m512i key[4];
  for (int i = 0; i < 4; ++i) key[i] = _mm512_load_si512(sums + i * kPanel);
  const __m512i upper[2] = {_mm512_shuffle_i32x4(key[0], key[1], 0x44), _mm512_shuffle_i32x4(key[2], key[3], 0x44)};
  const __m512i lower[2] = {_mm512_shuffle_i32x4(key[0], key[1], 0xee), _mm512_shuffle_i32x4(key[2], key[3], 0xee)};
  const Int high = (Int)_mm512_shuffle_i32x4(upper[0], upper[1], 0x88);
  const Int middle = (Int)_mm512_shuffle_i32x4(upper[0], upper[1], 0xdd);
  const Int low = (Int)_mm512_shuffle_i32x4(lower[0], lower[1], 0x88);
  return __builtin_convertvector((((high << 8) + middle) << 8) + low, Float);
}

// scores[row][key] of at most four rows over 64 keys. Tiles of the query: D / 64, [D, part, row].
inline void score_four(const PagedRows<int8_t>& keys, int begin, int stop, int last, const int8_t* query, int rows,
                       const float* key_scales, float* scores) {
  const int size = keys.head_size;
  alignas(64) int32_t sums[kTile * kPanel];
  finish_stores();
  for (int i = 0; i < 4; ++i) {
    const int key = begin + i * kPanel;
    const int8_t* const block = keys.at(min(key, (stop - 1) / kPanel * kPanel));  // past the end nobody looks at them
    const Ahead ahead = rows_ahead(keys, key + kFewAhead, last);
    zero_tile<0>();
    for (int d = 0; d < size; d += kBytes) {
      if (i == 0 || size > kBytes) load_tile<7>(query + d * kPanel, kBytes);
      load_tile<6>(block + d, size);
      __asm__ volatile("tdpbssd %tmm7, %tmm6, %tmm0");
      ahead.fetch_kilobyte(d * kPanel);
    }
    store_tile<0>(sums + i * kPanel * kPanel, kBytes);
  }
  finish_stores();
  for (int i = 0; i < 4; ++i) {
    Float columns[kFour];
    for (int v = 0; v < kFour; ++v) columns[v] = add_query_parts(sums + (i * kFour + v) * kFour * kPanel);
    split_columns(columns);
    for (int r = 0; r < rows; ++r)
      store(scores + r * kScoreRow + i * kPanel, columns[r] * load(key_scales + i * kPanel));
  }
}

// 16 weights as integers of 16 bits, in both parts (a tile apart) four times: alone in each byte of their column.
inline void spread_weights(const float* weights, Float inverse, uint8_t* to) {
  const UInt x = as_integers(load(weights), inverse);
  const __m512i kLower = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  const UInt lower = (UInt)_mm512_shuffle_epi8((__m512i)x, kLower);
  const UInt upper = (UInt)_mm512_shuffle_epi8((__m512i)x, _mm512_add_epi8(kLower, _mm512_set1_epi8(1)));
  for (int place = 0; place < 4; ++place, to += kBytes) {
    const UInt high = upper & 0xffu << 8 * place, low = lower & 0xffu << 8 * place;
    memcpy(to, &high, sizeof high);
    memcpy(to + kTileBytes, &low, sizeof low);
  }
}

// Four rows' weights of a split, [rows, kScoreRow], times the values' scales: a row's are integers times its factor.
struct FourWeights {
  const float* scaled;
  const float *inverses, *factors;
  int rows;
};

// Tiles kUpper and kUpper + 1 += spread weights x 16 values as they lie. Columns are four neighbours: row 4 r + i
// of the product takes the i-th of them.
template <int kUpper>
inline void add_sixteen(const uint8_t* spread, const int8_t* values, int64_t size) {
  load_tile<6>(values, size);
  load_tile<7>(spread, kBytes);
  __asm__ volatile("tdpbusd %%tmm6, %%tmm7, %%tmm%c0" : : "i"(kUpper));
  load_tile<7>(spread + kTileBytes, kBytes);
  __asm__ volatile("tdpbusd %%tmm6, %%tmm7, %%tmm%c0" : : "i"(kUpper + 1));
}

// One row's 64 columns from the products' four rows, times `factor`, in the order of packed values.
inline void join_columns(const int32_t* even, const int32_t* odd, float factor, float* out) {
  __m512 x[4];
  for (int i = 0; i < 4; ++i, even += kPanel, odd += kPanel) {
    const auto both = [&](int part) {
      const int at = part * kPanel * kPanel;
      return _mm512_add_epi32(_mm512_load_si512(even + at), _mm512_load_si512(odd + at));
    };
    x[i] = __builtin_convertvector((Int)_mm512_add_epi32(_mm512_slli_epi32(both(0), 8), both(1)), Float) * factor;
  }
  const __m512 low[2] = {_mm512_unpacklo_ps(x[0], x[2]), _mm512_unpacklo_ps(x[1], x[3])};
  const __m512 high[2] = {_mm512_unpackhi_ps(x[0], x[2]), _mm512_unpackhi_ps(x[1], x[3])};
  store(out, _mm512_unpacklo_ps(low[0], low[1]));
  store(out + kPanel, _mm512_unpackhi_ps(low[0], low[1]));
  store(out + 2 * kPanel, _mm512_unpacklo_ps(high[0], high[1]));
  store(out + 3 * kPanel, _mm512_unpackhi_ps(high[0], high[1]));
}

// out [rows, D] of at most four rows: weights x values of positions [begin, stop).
inline void sum_four(const PagedRows<int8_t>& values, int begin, int stop, int last, const FourWeights& x, float* out) {
  const int size = values.head_size;
  alignas(64) uint8_t spread[4][2 * kTileBytes];     // of 64 keys: a tile waits for what was just stored
  alignas(64) int32_t sums[2][2 * kPanel * kPanel];  // of every other 16 values: two chains of products in both parts
  const auto block = [&](int key) { return values.at(min(key, (stop - 1) / kPanel * kPanel)); };
  for (int d = 0; d < size; d += kBytes) {
    zero_tile<2>();
    zero_tile<3>();
    zero_tile<4>();
    zero_tile<5>();
    for (int key = begin; key < stop; key += kTile) {
      for (int i = 0; i < 4; ++i) {
        const int at = i * kPanel;
        rows_ahead(values, key + at + kFewAhead, last).fetch_kilobyte(d * kPanel);
        for (int r = 0; r < x.rows; ++r)
          spread_weights(x.scaled + r * kScoreRow + key - begin + at, broadcast(x.inverses[r]),
                         spread[i] + r * 4 * kBytes);
      }
      finish_stores();
      add_sixteen<2>(spread[0], block(key) + d, size);
      add_sixteen<4>(spread[1], block(key + kPanel) + d, size);
      add_sixteen<2>(spread[2], block(key + 2 * kPanel) + d, size);
      add_sixteen<4>(spread[3], block(key + 3 * kPanel) + d, size);
    }
    store_tile<2>(sums[0], kBytes);
    store_tile<3>(sums[0] + kPanel * kPanel, kBytes);
    store_tile<4>(sums[1], kBytes);
    store_tile<5>(sums[1] + kPanel * kPanel, kBytes);
    for (int r = 0; r < x.rows; ++r)
      join_columns(sums[0] + r * 4 * kPanel, sums[1] + r * 4 * kPanel, x.factors[r], out + r * size + d);
  }
}

}  // namespace
