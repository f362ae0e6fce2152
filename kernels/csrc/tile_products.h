// Products in AMX tile registers: blocks of queries, keys, weights and values in bfloat16, and how they get into tiles.
//
// A product adds, for every element, the even products of 32 in one chain of fused multiply-adds and the odd ones in
// another, then their sum to the element. So an element's bits depend on its row and its column alone, and not on which
// of the two factors is which: a few rows (a decode) read keys as they lie in the page, many transpose them once.
#pragma once

#include "tile_rows.h"

namespace {

constexpr int kDepth = 32;                   // bfloat16 numbers in a row of a tile register
constexpr int kWeightRow = kSplit + kDepth;  // see kScoreRow
constexpr int kTileElements = kPanel * kDepth;

// A is row-major; for each tile row of B it has kParts blocks of kDepth columns, whose products are added. B is made of
// tiles (rows of pairs), `column` apart, the next step's `step` on. Four tiles of C keep four chains of products going.
struct Product {
  const BFloat16* a;
  int64_t a_row;  // elements from row to row
  const BFloat16* b;
  int64_t b_step, b_column;
  int steps;
  float* c;
  int64_t c_row;
};

// C [32, 32] = A B.
template <int kParts>
inline void multiply_two_panels(const Product& x) {
  const int64_t row_bytes = x.a_row * int64_t{sizeof(BFloat16)}, out_bytes = x.c_row * int64_t{sizeof(float)};
  const BFloat16 *a = x.a, *b = x.b;
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < x.steps; ++step, b += x.b_step) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + x.b_column, 64);
    for (int part = 0; part < kParts; ++part, a += kDepth) {
      _tile_loadd(4, a, row_bytes);
      _tile_loadd(5, a + kPanel * x.a_row, row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, x.c, out_bytes);
  _tile_stored(1, x.c + kPanel, out_bytes);
  _tile_stored(2, x.c + kPanel * x.c_row, out_bytes);
  _tile_stored(3, x.c + kPanel * x.c_row + kPanel, out_bytes);
}

// C [16, 64] = A B.
template <int kParts>
inline void multiply_one_panel(const Product& x) {
  const int64_t row_bytes = x.a_row * int64_t{sizeof(BFloat16)}, out_bytes = x.c_row * int64_t{sizeof(float)};
  const BFloat16 *a = x.a, *b = x.b;
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < x.steps; ++step, b += x.b_step, a += kParts * kDepth) {
    _tile_loadd(4, a, row_bytes);
    if constexpr (kParts == 2) _tile_loadd(5, a + kDepth, row_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kParts == 2) _tile_dpbf16ps(0, 5, 6);
    _tile_loadd(7, b + x.b_column, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kParts == 2) _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, b + 2 * x.b_column, 64);
    _tile_dpbf16ps(2, 4, 6);
    if constexpr (kParts == 2) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + 3 * x.b_column, 64);
    _tile_dpbf16ps(3, 4, 7);
    if constexpr (kParts == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, x.c, out_bytes);
  _tile_stored(1, x.c + kPanel, out_bytes);
  _tile_stored(2, x.c + 2 * kPanel, out_bytes);
  _tile_stored(3, x.c + 3 * kPanel, out_bytes);
}

// C [up to 32, columns] = A B, columns a multiple of 64.
template <int kParts>
void multiply(Product x, int rows, int columns) {
  const int width = rows > kPanel ? 2 * kPanel : 4 * kPanel;
  for (int j = 0; j < columns; j += width, x.c += width, x.b += width / kPanel * x.b_column) {
    if (rows > kPanel) multiply_two_panels<kParts>(x);
    else multiply_one_panel<kParts>(x);
  }
}

// A tile of 16 rows of 32 numbers, transposed as 16 x 16 pairs: row i of the result holds pair i of every row.
inline void transpose_pairs(const BFloat16* from, int64_t row_stride, BFloat16* to) {
  Float square[kPanel];
  for (int i = 0; i < kPanel; ++i) memcpy(&square[i], from + i * row_stride, sizeof(Float));
  transpose(square);
  for (int i = 0; i < kPanel; ++i) memcpy(to + i * kDepth, &square[i], sizeof(Float));
}

// 64 keys or values from position `begin` on: up to `stop` they are read, up to `last` fetched ahead.
struct KVTile {
  PagedRows<BFloat16> rows;
  int begin, stop, last;
};

inline KVTile tile_of(const PagedRows<BFloat16>& rows, int begin, int stop, int last, BFloat16* /*memory*/) {
  return {rows, begin, stop, last};
}

// Int8 is widened to `memory` [64, D], which then is the one page of a tile of its own.
inline KVTile tile_of(const PagedRows<int8_t>& rows, int begin, int stop, int last, BFloat16* memory) {
  static constexpr int32_t kOnlyPage = 0;
  const int block = kPanel * rows.head_size;  // numbers
  BFloat16* to = memory;
  for (int key = begin; key < min(begin + kTile, stop); key += kPanel, to += block) {
    const int8_t* const from = rows.at(key);
    const int8_t* const ahead = key + kTile < last ? rows.at(key + kTile) : nullptr;
    for (int d = 0; d < block; d += kDepth) {
      if (ahead != nullptr && d % 64 == 0) __builtin_prefetch(ahead + d, 0, 2);  // bursts are slower
      const __m512bh both = _mm512_cvtne2ps_pbh(load_wide(from + d + kLanes), load_wide(from + d));
      memcpy(to + d, &both, sizeof both);
    }
  }
  return {{memory, &kOnlyPage, 0, __builtin_ctz(kTile), rows.head_size}, 0, min(kTile, stop - begin), 0};
}

// scores[row][key] of at most kColumns rows, whose transposed tiles are `query`: 64 keys, as they lie in their page.
template <int kParts, int kColumns>
void score_few(const KVTile& tile, const BFloat16* query, int rows, float* scores) {
  const auto& [keys, begin, stop, last] = tile;
  Float columns[4][kColumns];
  finish_stores();
  for (int i = 0; i < 4; ++i) {
    const int key = begin + i * kPanel, ahead = key + kTile;
    const BFloat16* const block = keys.at(min(key, (stop - 1) / kPanel * kPanel));  // past the end nobody looks at them
    const BFloat16* const next = ahead < last ? keys.at(ahead) : nullptr;
    const BFloat16* q = query;
    _tile_zero(0);
    for (int d = 0; d < keys.head_size; d += kDepth, q += kParts * kTileElements) {
      if (next != nullptr) prefetch(next + d * kPanel);
      _tile_loadd(6, block + d, keys.head_size * sizeof(BFloat16));
      _tile_loadd(1, q, 64);
      _tile_dpbf16ps(0, 6, 1);
      if constexpr (kParts == 2) {
        _tile_loadd(1, q + kTileElements, 64);
        _tile_dpbf16ps(0, 6, 1);
      }
    }
    _tile_stored(0, columns[i], kColumns * sizeof(float));
  }
  for (int i = 0; i < 4; ++i) {
    split_columns(columns[i]);
    for (int r = 0; r < rows; ++r) store(scores + r * kScoreRow + i * kPanel, columns[i][r]);
  }
}

// 64 keys as tiles of pairs by key: 16 keys after 16 keys, each D / 32 tiles.
void pack_keys(const KVTile& tile, BFloat16* to) {
  const auto& [keys, begin, stop, last] = tile;
  for (int key = begin; key < min(begin + kTile, stop); key += kPanel) {
    const BFloat16* const block = keys.at(key);
    for (int d = 0; d < keys.head_size; d += kDepth, to += kTileElements)
      transpose_pairs(block + d, keys.head_size, to);
  }
}

// Two rows of 32 numbers as two tile rows of 16 pairs. Interleaving works within 128 bits, so the columns come in the
// order 0-3 8-11 16-19 24-27 and 4-7 12-15 20-23 28-31: see restore_order().
inline void interleave(__m512i even, __m512i odd, BFloat16* first, BFloat16* second) {
  _mm512_storeu_si512(first, _mm512_unpacklo_epi16(even, odd));
  _mm512_storeu_si512(second, _mm512_unpackhi_epi16(even, odd));
}

// The columns of a row of products with values that were packed, in their own order again.
inline void restore_order(float* row, int width) {
  const Int kFirst = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}, kSecond = kFirst + 8;
  for (int d = 0; d < width; d += kDepth) {
    const Float low = load(row + d), high = load(row + d + kLanes);
    store(row + d, __builtin_shuffle(low, high, kFirst));
    store(row + d + kLanes, __builtin_shuffle(low, high, kSecond));
  }
}

// 32 values from row `first` of the tile on, columns [d, d + 64), as four tiles of pairs of keys. Beyond its end: 0.
inline void pack_values(const KVTile& tile, int first, int d, BFloat16* to) {
  const auto& [values, begin, stop, last] = tile;
  const int size = values.head_size;
  for (int key = begin + first; key < begin + first + kDepth; key += kPanel) {
    const BFloat16* row = key < stop ? values.at(key) + d : nullptr;
    const BFloat16* next = d == 0 && key + kTile < last ? values.at(key + kTile) : nullptr;
    for (int i = 0; i < kPanel; i += 2, row += 2 * size, to += kDepth) {
      if (next != nullptr && i * size % 512 == 0) prefetch(next + i * size);
      for (int half = 0; half < 2; ++half) {
        const __m512i even = key + i < stop ? _mm512_loadu_si512(row + half * kDepth) : __m512i{};
        const __m512i odd = key + i + 1 < stop ? _mm512_loadu_si512(row + size + half * kDepth) : __m512i{};
        BFloat16* const at = to + 2 * half * kTileElements;
        interleave(even, odd, at, at + kTileElements);
      }
    }
  }
}

// Tiles 2 to 5 += weights [rows, 64] x columns [d, d + 64) of 64 values, which are packed on the way.
inline void add_values(const KVTile& tile, int d, const BFloat16* weights, BFloat16* packed) {
  for (int first = 0; first < kTile; first += kDepth, packed += 4 * kTileElements) {
    pack_values(tile, first, d, packed);
    finish_stores();
    _tile_loadd(7, weights + first, kWeightRow * sizeof(BFloat16));
    _tile_loadd(6, packed, 64);
    _tile_dpbf16ps(2, 7, 6);
    _tile_loadd(6, packed + kTileElements, 64);
    _tile_dpbf16ps(3, 7, 6);
    _tile_loadd(6, packed + 2 * kTileElements, 64);
    _tile_dpbf16ps(4, 7, 6);
    _tile_loadd(6, packed + 3 * kTileElements, 64);
    _tile_dpbf16ps(5, 7, 6);
  }
}

}  // namespace
