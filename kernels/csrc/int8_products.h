// Products over int8 caches in AMX tiles of integers. A query counts as integers of 24 bits, its weights as integers of
// 16 bits, both in bytes ("parts") whose products with the codes of keys and values are exact: a row's bits depend
// neither on the rows beside it nor on the order of the sums. Scales of keys multiply the scores; those of values the
// weights, before they become integers.
#pragma once

#include "tile_rows.h"

namespace {

constexpr int kQueryParts = 3, kWeightParts = 2;
constexpr int kBytes = 64;                            // numbers in a row of a tile register
constexpr int kTileBytes = kPanel * kBytes;
constexpr int kWeightBytesRow = kSplit + kBytes, kSumRow = kTile + kPanel;
constexpr float kLargestQuery = 0x7f7f7f;             // what three signed bytes hold
constexpr float kQuerySum = 0xffffff - 1024;          // of sizes: with bytes, products add up to less than 2^31
constexpr float kLargestWeight = 0xffff;
constexpr float kLeastUnit = 1e-36f;                  // below it the inverse may be no float: such a row counts as 0

// A is row-major, in tiles of 16 rows. B is made of tiles (four numbers of 16 columns a row), `column` apart, the next
// step's `step` on. C is row-major, 16 rows of it for each tile of A. Distances in elements.
struct ByteProduct {
  const void* a;
  int64_t a_row;
  const int8_t* b;
  int64_t b_step, b_column;
  int steps;
  int32_t* c;
  int64_t c_row;
};

// Tile kSum += tile 6 (A) x tile 7 (B).
template <int kSum, bool kSigned>
inline void multiply_bytes() {
  if constexpr (kSigned) __asm__ volatile("tdpbssd %%tmm7, %%tmm6, %%tmm%c0" : : "i"(kSum));
  else __asm__ volatile("tdpbusd %%tmm7, %%tmm6, %%tmm%c0" : : "i"(kSum));
}

// From the product of tile kRows of A and kColumn of B on: the next step's are added. Sums are in tiles 0 to 5.
template <bool kSigned, int kTiles, int kColumns, int kIndex = 0>
inline void add_products(const ByteProduct& x, const char* a, const int8_t* b) {
  if constexpr (kIndex < kTiles * kColumns) {
    constexpr int kRows = kIndex % kTiles, kColumn = kIndex / kTiles;
    if constexpr (kRows == 0) load_tile<7>(b + kColumn * x.b_column, kBytes);
    if constexpr (kTiles > 1 || kIndex == 0) load_tile<6>(a + kRows * kPanel * x.a_row, x.a_row);
    multiply_bytes<kIndex, kSigned>();
    add_products<kSigned, kTiles, kColumns, kIndex + 1>(x, a, b);
  }
}

template <int kTiles, int kColumns, int kIndex = 0>
inline void zero_sums() {
  if constexpr (kIndex < kTiles * kColumns) {
    zero_tile<kIndex>();
    zero_sums<kTiles, kColumns, kIndex + 1>();
  }
}

template <int kTiles, int kColumns, int kIndex = 0>
inline void store_sums(const ByteProduct& x) {
  if constexpr (kIndex < kTiles * kColumns) {
    store_tile<kIndex>(x.c + kIndex % kTiles * kPanel * x.c_row + kIndex / kTiles * kPanel,
                       x.c_row * int64_t{sizeof(int32_t)});
    store_sums<kTiles, kColumns, kIndex + 1>(x);
  }
}

// C [16 kTiles, columns] = A B, columns a multiple of 64.
template <bool kSigned, int kTiles, int kColumns>
void multiply_columns(ByteProduct x, int columns) {
  for (int j = 0; j < columns; j += kColumns * kPanel, x.b += kColumns * x.b_column, x.c += kColumns * kPanel) {
    zero_sums<kTiles, kColumns>();
    for (int step = 0; step < x.steps; ++step)
      add_products<kSigned, kTiles, kColumns>(x, static_cast<const char*>(x.a) + step * kBytes, x.b + step * x.b_step);
    store_sums<kTiles, kColumns>(x);
  }
}

// Of as many tiles of A as hold `rows` rows, at most 48.
template <bool kSigned>
void multiply_bytes(const ByteProduct& x, int rows, int columns) {
  finish_stores();
  if (rows <= kPanel) multiply_columns<kSigned, 1, 4>(x, columns);
  else if (rows <= 2 * kPanel) multiply_columns<kSigned, 2, 2>(x, columns);
  else multiply_columns<kSigned, 3, 2>(x, columns);
}

// x is low + 256 times what is returned; low is the signed byte in the lowest eight bits.
inline Int without_low_byte(Int x) { return (x - (x << 24 >> 24)) >> 8; }

inline void store_low_bytes(int8_t* to, Int x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
}

// The head's numbers times `sign` as integers, the highest part first, `part` bytes apart; returns what they are to be
// multiplied by. NaN and infinity make that one.
template <typename T>
float split_query(const T* query, float sign, int head_size, int64_t part, int8_t* to) {
  Float sizes{}, highest{};
  for (int d = 0; d < head_size; d += kLanes) {
    const Float size = (Float)((Int)load_wide(query + d) & 0x7fffffff);
    sizes += size;
    highest = max(size, highest);
  }
  float unit = sum(sizes) / kQuerySum;
  if (max(highest) / kLargestQuery > unit) unit = max(highest) / kLargestQuery;
  if (unit < kLeastUnit) unit = 0;
  const float inverse = unit == 0 ? 0 : sign / unit;
  for (int d = 0; d < head_size; d += kLanes) {
    const Int low = (Int)_mm512_cvtps_epi32(load_wide(query + d) * inverse);
    const Int middle = without_low_byte(low);
    store_low_bytes(to + d, without_low_byte(middle));
    store_low_bytes(to + d + part, middle);
    store_low_bytes(to + d + 2 * part, low);
  }
  return unit == 0 ? 1 : unit;
}

// Prefetches, line by line, the rows that are read later: spread, so that reading never waits for computing.
struct Ahead {
  const char* row;  // or null
  void fetch(int byte) const {
    if (row != nullptr) __builtin_prefetch(row + byte, 0, 2);
  }
  void fetch_kilobyte(int byte) const {
    if (row != nullptr) prefetch(row + byte);
  }
  Ahead from(int byte) const { return {row == nullptr ? nullptr : row + byte}; }
};

inline Ahead rows_ahead(const PagedRows<int8_t>& rows, int position, int last) {
  return {position < last ? reinterpret_cast<const char*>(rows.at(position)) : nullptr};
}

// 16 rows of 64 numbers as a tile of four numbers by row.
inline void transpose_fours(const int8_t* from, int64_t row, Ahead ahead, int8_t* to) {
  Float square[kPanel];
  for (int i = 0; i < kPanel; ++i) {
    memcpy(&square[i], from + i * row, sizeof(Float));
    ahead.fetch(i * row);
  }
  transpose(square);
  for (int i = 0; i < kPanel; ++i) memcpy(to + i * kBytes, &square[i], sizeof(Float));
}

// 64 keys from position `begin` on, 16 after 16, each D / 64 tiles. From `stop` on nothing is written; up to `last`
// keys are fetched ahead.
void pack_keys(const PagedRows<int8_t>& keys, int begin, int stop, int last, int8_t* to) {
  const int size = keys.head_size;
  for (int key = begin; key < min(begin + kTile, stop); key += kPanel) {
    const Ahead ahead = rows_ahead(keys, key + kTile, last);
    for (int d = 0; d < size; d += kBytes, to += kTileBytes) transpose_fours(keys.at(key) + d, size, ahead.from(d), to);
  }
}

// 64 values as D / 16 tiles of four keys by column: keys i, 32 + i, 16 + i and 48 + i are row i, as pack_weights() has
// them; the columns of 64 have an order of their own, see restore_bytes_order(). Values from `stop` on may be any, as
// their weights are 0.
void pack_values(const PagedRows<int8_t>& values, int begin, int stop, int last, int8_t* to) {
  const int size = values.head_size;
  const int8_t* block[4];
  Ahead ahead[4];
  for (int i = 0; i < 4; ++i) {
    const int key = begin + i * kPanel;
    block[i] = values.at(min(key, (stop - 1) / kPanel * kPanel));
    ahead[i] = rows_ahead(values, key + kTile, last);
  }
  for (int row = 0; row < kPanel; ++row, to += kBytes) {
    for (int d = 0; d < size; d += kBytes) {
      __m512i x[4];
      for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_loadu_si512(block[i] + row * size + d);
        ahead[i].fetch(row * size + d);
      }
      const __m512i low[2] = {_mm512_unpacklo_epi8(x[0], x[2]), _mm512_unpacklo_epi8(x[1], x[3])};
      const __m512i high[2] = {_mm512_unpackhi_epi8(x[0], x[2]), _mm512_unpackhi_epi8(x[1], x[3])};
      int8_t* const at = to + d / kPanel * kTileBytes;
      _mm512_storeu_si512(at, _mm512_unpacklo_epi16(low[0], low[1]));
      _mm512_storeu_si512(at + kTileBytes, _mm512_unpackhi_epi16(low[0], low[1]));
      _mm512_storeu_si512(at + 2 * kTileBytes, _mm512_unpacklo_epi16(high[0], high[1]));
      _mm512_storeu_si512(at + 3 * kTileBytes, _mm512_unpackhi_epi16(high[0], high[1]));
    }
  }
}

// The whole from the sums of a query's parts, which lie `part` apart.
inline Float add_query_parts(const int32_t* sums, int64_t part) {
  Int high, middle, low;
  memcpy(&high, sums, sizeof high);
  memcpy(&middle, sums + part, sizeof middle);
  memcpy(&low, sums + 2 * part, sizeof low);
  return __builtin_convertvector((((high << 8) + middle) << 8) + low, Float);
}

// Scores of `rows` rows over 64 keys from the sums of a query's parts: [parts, rows, kSumRow].
inline void add_query_parts(const int32_t* sums, int rows, const float* key_scales, float* scores) {
  const int64_t part = rows * int64_t{kSumRow};
  for (int r = 0; r < rows; ++r, sums += kSumRow, scores += kScoreRow)
    for (int j = 0; j < kTile; j += kLanes) store(scores + j, add_query_parts(sums + j, part) * load(key_scales + j));
}

// What a row's weights are to be multiplied by to become integers, from their unit.
inline float inverse_of(float unit) { return unit < kLeastUnit ? 0 : 1 / unit; }

// Integers of 16 bits, below something.
inline UInt as_integers(Float weights, Float inverse) {
  constexpr float kRound = 8388608.0f;  // 2^23: adding it leaves round(x) in the low bits
  return (UInt)fma(weights, inverse, broadcast(kRound));
}

// Weights as integers: the upper bytes, `part` bytes on the lower. `count` is a multiple of 64, within which the keys
// come in the order of pack_values().
inline void pack_weights(const float* weights, Float inverse, int count, int64_t part, uint8_t* to) {
  for (int j = 0; j < count; j += kTile) {
    UInt x[4];
    for (int i = 0; i < 4; ++i) x[i] = as_integers(load(weights + j + i * kLanes), inverse);
    const UInt first = (x[0] & 0xffffu) | x[1] << 16, second = (x[2] & 0xffffu) | x[3] << 16;
    const UInt upper = (first >> 8 & 0xff00ffu) | (second & 0xff00ff00u);
    const UInt lower = (first & 0xff00ffu) | (second << 8 & 0xff00ff00u);
    memcpy(to + j, &upper, sizeof upper);
    memcpy(to + j + part, &lower, sizeof lower);
  }
}

// A row of sums over packed values, `part` on those of the lower bytes, times `factor`.
inline void add_weight_parts(const int32_t* sums, int64_t part, int head_size, float factor, float* out) {
  for (int d = 0; d < head_size; d += kLanes) {
    Int high, low;
    memcpy(&high, sums + d, sizeof high);
    memcpy(&low, sums + part + d, sizeof low);
    store(out + d, __builtin_convertvector((high << 8) + low, Float) * factor);
  }
}

// The columns of a row of products with values that were packed, in their own order again: a transposition of fours.
inline void restore_bytes_order(float* row, int width) {
  for (int d = 0; d < width; d += kBytes) {
    __m512 x[4];
    for (int i = 0; i < 4; ++i) x[i] = load(row + d + i * kLanes);
    const __m512 even[2] = {_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[2], x[3], 0x88)};
    const __m512 odd[2] = {_mm512_shuffle_f32x4(x[0], x[1], 0xdd), _mm512_shuffle_f32x4(x[2], x[3], 0xdd)};
    const Float y[4] = {_mm512_shuffle_f32x4(even[0], even[1], 0x88), _mm512_shuffle_f32x4(odd[0], odd[1], 0x88),
                        _mm512_shuffle_f32x4(even[0], even[1], 0xdd), _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd)};
    for (int i = 0; i < 4; ++i) store(row + d + i * kLanes, y[i]);
  }
}

}  // namespace
