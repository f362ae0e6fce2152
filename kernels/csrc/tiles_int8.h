// Products over int8 caches in AMX tiles of integers. A query counts as integers of 24 bits, its weights as integers of
// 16 bits, both in bytes ("parts") whose products with the codes of keys and values are exact: a row's bits depend neither
// on the rows beside it nor on the order of the sums. Scales of keys multiply the scores; those of values the weights,
// before they become integers.
#pragma once

#include "tile_rows.h"

namespace {

constexpr int kQueryParts = 3, kWeightParts = 2;
constexpr int kBytes = 64;                            // numbers in a row of a tile register
constexpr int kTileBytes = kPanel * kBytes;
constexpr int kWeightBytesRow = kSplit + kBytes, kSumRow = kTile + kPanel;
constexpr float kLargestQuery = 0x7f7f7f;             // what three signed bytes hold
constexpr float kQuerySum = 0xffffff - 1024;          // of a head's sizes: with bytes, products add up to less than 2^31
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
};

inline Ahead rows_ahead(const PagedRows<int8_t>& rows, int position, int last) {
  return {position < last ? reinterpret_cast<const char*>(rows.at(position)) : nullptr};
}

// 64 keys from position `begin` on as tiles of four numbers by key: 16 keys after 16 keys, each D / 64 tiles. From `stop`
// on nothing is written; up to `last` keys are fetched ahead.
void pack_keys(const PagedRows<int8_t>& keys, int begin, int stop, int last, int8_t* to) {
  const int size = keys.head_size;
  for (int key = begin; key < min(begin + kTile, stop); key += kPanel) {
    const int8_t* const block = keys.at(key);
    const Ahead ahead = rows_ahead(keys, key + kTile, last);
    for (int d = 0; d < size; d += kBytes, to += kTileBytes) {
      Float square[kPanel];
      for (int i = 0; i < kPanel; ++i) {
        memcpy(&square[i], block + i * size + d, sizeof(Float));
        ahead.fetch(i * size + d);
      }
      transpose(square);
      for (int i = 0; i < kPanel; ++i) memcpy(to + i * kBytes, &square[i], sizeof(Float));
    }
  }
}

// 64 values as D / 16 tiles of four keys by column; from `stop` on they are whatever was there, and their weights 0. Keys
// 4 (4 i + l) on are row 4 l + i, as pack_weights() has them, and the columns of 64 are in the order of unpack_columns().
void pack_values(const PagedRows<int8_t>& values, int begin, int stop, int last, int8_t* to) {
  const int size = values.head_size;
  for (int key = begin; key < min(begin + kTile, stop); key += kPanel) {
    const int8_t* const block = values.at(key);
    const Ahead ahead = rows_ahead(values, key + kTile, last);
    int8_t* const first = to + (key - begin) / kPanel * kBytes;
    for (int row = 0; row < kPanel; row += 4) {
      for (int d = 0; d < size; d += kBytes) {
        __m512i x[4];
        for (int i = 0; i < 4; ++i) {
          x[i] = _mm512_loadu_si512(block + (row + i) * size + d);
          ahead.fetch((row + i) * size + d);
        }
        const __m512i low[2] = {_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpacklo_epi8(x[2], x[3])};
        const __m512i high[2] = {_mm512_unpackhi_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[2], x[3])};
        int8_t* const at = first + d / kPanel * kTileBytes + row * kBytes;
        _mm512_storeu_si512(at, _mm512_unpacklo_epi16(low[0], low[1]));
        _mm512_storeu_si512(at + kTileBytes, _mm512_unpackhi_epi16(low[0], low[1]));
        _mm512_storeu_si512(at + 2 * kTileBytes, _mm512_unpacklo_epi16(high[0], high[1]));
        _mm512_storeu_si512(at + 3 * kTileBytes, _mm512_unpackhi_epi16(high[0], high[1]));
      }
    }
  }
}

// Scores of `rows` rows over 64 keys from the sums of their parts.
inline void add_query_parts(const int32_t* sums, int rows, const float* key_scales, float* scores) {
  const int64_t part = rows * int64_t{kSumRow};
  for (int r = 0; r < rows; ++r, sums += kSumRow, scores += kScoreRow) {
    for (int j = 0; j < kTile; j += kLanes) {
      Int high, middle, low;
      memcpy(&high, sums + j, sizeof high);
      memcpy(&middle, sums + part + j, sizeof middle);
      memcpy(&low, sums + 2 * part + j, sizeof low);
      const Int whole = (((high << 8) + middle) << 8) + low;
      store(scores + j, __builtin_convertvector(whole, Float) * load(key_scales + j));
    }
  }
}

// Weights relative to the largest, as integers of 16 bits: the upper bytes, `part` bytes on the lower. `count` is a
// multiple of 64, within which packing leaves the keys in the order of pack_values().
inline void pack_weights(const float* weights, float largest, int count, int64_t part, uint8_t* to) {
  constexpr float kRound = 8388608.0f;  // 2^23: adding it leaves round(x) in the low bits
  const float unit = largest / kLargestWeight;
  const Float inverse = broadcast(unit < kLeastUnit ? 0 : 1 / unit);
  for (int j = 0; j < count; j += kTile) {
    __m512i x[4];
    for (int i = 0; i < 4; ++i)
      x[i] = (__m512i)((Int)fma(load(weights + j + i * kLanes), inverse, broadcast(kRound)) & 0xffff);
    const __m512i first = _mm512_packus_epi32(x[0], x[1]), second = _mm512_packus_epi32(x[2], x[3]);
    const __m512i byte = _mm512_set1_epi16(0xff);
    _mm512_storeu_si512(to + j, _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)));
    _mm512_storeu_si512(to + j + part,
                        _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte)));
  }
}

// A row of sums over packed values, `part` on those of the lower bytes, times `factor` and in the order of columns.
inline void unpack_columns(const int32_t* sums, int64_t part, int head_size, float factor, float* out) {
  for (int d = 0; d < head_size; d += kBytes) {
    __m512 x[4];
    for (int i = 0; i < 4; ++i) {
      Int high, low;
      memcpy(&high, sums + d + i * kLanes, sizeof high);
      memcpy(&low, sums + part + d + i * kLanes, sizeof low);
      x[i] = __builtin_convertvector((high << 8) + low, Float) * factor;
    }
    const __m512 even[2] = {_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[2], x[3], 0x88)};
    const __m512 odd[2] = {_mm512_shuffle_f32x4(x[0], x[1], 0xdd), _mm512_shuffle_f32x4(x[2], x[3], 0xdd)};
    const Float y[4] = {_mm512_shuffle_f32x4(even[0], even[1], 0x88), _mm512_shuffle_f32x4(odd[0], odd[1], 0x88),
                        _mm512_shuffle_f32x4(even[0], even[1], 0xdd), _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd)};
    for (int i = 0; i < 4; ++i) store(out + d + i * kLanes, y[i]);
  }
}

// Keys and values as they are stored, queries and weights as integers: see tiles_int8.h.
class Int8Operands {
 public:
  static constexpr int kRowsAtOnce = kPanel;

  Int8Operands(const AttentionParams& p, Arena& arena) : p_(p), size_(p.head_size) {
    arena.take(query_, (most_rows(p) * kQueryParts + kPanel) * size_);
    arena.take(query_scales_, most_rows(p));
    arena.take(keys_, int64_t{kSplit} * size_);
    arena.take(values_, int64_t{kSplit} * size_);
    arena.take(key_scales_, kSplit);
    arena.take(value_scales_, kSplit);
    arena.take(sums_, kQueryParts * kPanel * kSumRow);
    arena.take(weights_, kWeightParts * kPanel * kWeightBytesRow);
    arena.take(scaled_, kSplit);
    arena.take(out_sums_, kWeightParts * kPanel * int64_t{size_});
  }

  void start(const Segment& s, const Row* rows, int count) {
    key_rows_ = paged_rows<int8_t>(p_, s, p_.key_cache, p_.key_page_stride, p_.key_head_stride);
    value_rows_ = paged_rows<int8_t>(p_, s, p_.value_cache, p_.value_page_stride, p_.value_head_stride);
    scale_rows_ = paged_scales(p_, s);
    for (int first = 0; first < count; first += kPanel) {
      const int panel = min(kPanel, count - first);
      for (int r = first; r < first + panel; ++r) {
        int8_t* const to = query_ + (kQueryParts * first + r - first) * size_;
        query_scales_[r] = with_query(p_, rows[r], [&](auto* query) {
          return split_query(query, sign_of_scale(p_), size_, panel * size_, to);
        });
      }
    }
  }

  void read(int begin, int stop, int last, int at, float* /*scores*/) {
    pack_keys(key_rows_, begin, stop, last, keys_ + at * size_);
    load_scales(scale_rows_.keys, begin, stop, last, key_scales_ + at);
    pack_values(value_rows_, begin, stop, last, values_ + at * size_);
    load_scales(scale_rows_.values, begin, stop, last, value_scales_ + at);
  }

  void score(int first, int rows, int count, float* scores) {
    for (int at = 0; at < count; at += kTile) {
      multiply_bytes<true>({query_ + kQueryParts * first * size_, size_, keys_ + at * size_, kTileBytes,
                            size_ / kBytes * kTileBytes, size_ / kBytes, sums_, kSumRow},
                           kQueryParts * rows, kTile);
      add_query_parts(sums_, rows, key_scales_ + at, scores + at);
    }
  }

  template <bool kWithStats>
  Softmax weigh_row(int first, int r, int rows, float* scores, int lo, int hi, int count, float c) {
    UInt largest{};  // as bits: NaN is above all
    const Softmax state = weigh<kWithStats>(scores, lo, hi, count, c * query_scales_[first + r],
                                            [this, &largest](int j, const Float (&weight)[2]) {
                                              for (int half = 0; half < 2; ++half) {
                                                const int at = j + half * kLanes;
                                                const Float scaled = weight[half] * load(value_scales_ + at);
                                                largest = (UInt)_mm512_max_epu32((__m512i)largest, (__m512i)scaled);
                                                store(scaled_ + at, scaled);
                                              }
                                            });
    const float most = from_bits(_mm512_reduce_max_epu32((__m512i)largest));
    factors_[r] = most / kLargestWeight;
    pack_weights(scaled_, most, count, rows * int64_t{kWeightBytesRow}, weights_ + r * kWeightBytesRow);
    return state;
  }

  void sees_nothing(int r, int rows, int count) {
    for (int part = 0; part < kWeightParts; ++part) memset(weights_ + (part * rows + r) * kWeightBytesRow, 0, count);
    factors_[r] = 0;
  }

  void sum_values(int rows, int count, float* out) {
    multiply_bytes<false>({weights_, kWeightBytesRow, values_, int64_t{kTile} * size_, kTileBytes, count / kTile,
                           out_sums_, size_},
                          kWeightParts * rows, size_);
    for (int r = 0; r < rows; ++r)
      unpack_columns(out_sums_ + r * size_, rows * int64_t{size_}, size_, factors_[r], out + r * size_);
  }

 private:
  const AttentionParams& p_;
  const int size_;
  PagedRows<int8_t> key_rows_, value_rows_;
  TileScales scale_rows_;
  int8_t* query_;        // [rows in panels of 16, parts, rows of the panel, D]
  float* query_scales_;  // [rows]
  int8_t *keys_, *values_;             // tiles of the split
  float *key_scales_, *value_scales_;  // [kSplit]
  int32_t* sums_;        // [parts, rows, kSumRow]: of 64 keys
  uint8_t* weights_;     // [parts, rows, kWeightBytesRow]
  float* scaled_;        // [kSplit]: a row's weights times the values' scales
  int32_t* out_sums_;    // [parts, rows, D]
  float factors_[kPanel];  // of a row's integers
};

}  // namespace
