// Products in AMX tile registers: blocks of queries, keys, weights and values in bfloat16, and how they get into tiles.
//
// A product adds, for every element, the even products of 32 in one chain of fused multiply-adds and the odd ones in
// another, then their sum to the element. So an element's bits depend on its row and its column alone, and not on which
// of the two factors is which: a few rows (a decode) read keys as they lie in the page, many transpose them once.
#pragma once

#include "tile_rows.h"

namespace {

constexpr int kDepth = 32;                      // bfloat16 numbers in one of its rows
constexpr int kWeightRow = kSplit + kDepth;      // not a power of two
constexpr int kTileElements = kPanel * kDepth;

constexpr TileShape kFull{kPanel, kDepth * sizeof(BFloat16)};

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

// Into L2, a kilobyte of what is read a tile later: in small portions, so that reading never waits for computing.
inline void prefetch(const void* start) {
  for (int byte = 0; byte < 1024; byte += 64) __builtin_prefetch(static_cast<const char*>(start) + byte, 0, 2);
}

// 64 keys or values from position `begin` on: up to `stop` they are read, up to `last` fetched ahead.
struct KVTile {
  PagedRows<BFloat16> rows;
  int begin, stop, last;
};

// scores[row][key] of at most 16 rows, whose transposed tiles are `query`: over 64 keys, as they lie in their page.
template <int kParts>
void score_few(const KVTile& tile, const BFloat16* query, int rows, float* scores) {
  const auto& [keys, begin, stop, last] = tile;
  const BFloat16* ahead[4];
  for (int i = 0; i < 4; ++i) {
    const int key = begin + kTile + i * kPanel;
    ahead[i] = key < last ? keys.at(key) : nullptr;
  }
  const BFloat16* block[4];  // past the end, keys that nobody looks at
  for (int i = 0; i < 4; ++i) block[i] = keys.at(min(begin + i * kPanel, (stop - 1) / kPanel * kPanel));
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const BFloat16* q = query;
  for (int d = 0; d < keys.head_size; d += kDepth, q += kParts * kTileElements) {
    const int64_t row_bytes = keys.head_size * sizeof(BFloat16);
    _tile_loadd(6, q, 64);
    if constexpr (kParts == 2) _tile_loadd(7, q + kTileElements, 64);
    if (ahead[0] != nullptr) prefetch(ahead[0] + d * kPanel);
    _tile_loadd(4, block[0] + d, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kParts == 2) _tile_dpbf16ps(0, 4, 7);
    if (ahead[1] != nullptr) prefetch(ahead[1] + d * kPanel);
    _tile_loadd(5, block[1] + d, row_bytes);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kParts == 2) _tile_dpbf16ps(1, 5, 7);
    if (ahead[2] != nullptr) prefetch(ahead[2] + d * kPanel);
    _tile_loadd(4, block[2] + d, row_bytes);
    _tile_dpbf16ps(2, 4, 6);
    if constexpr (kParts == 2) _tile_dpbf16ps(2, 4, 7);
    if (ahead[3] != nullptr) prefetch(ahead[3] + d * kPanel);
    _tile_loadd(5, block[3] + d, row_bytes);
    _tile_dpbf16ps(3, 5, 6);
    if constexpr (kParts == 2) _tile_dpbf16ps(3, 5, 7);
  }
  Float square[4][kPanel];  // key by row
  _tile_stored(0, square[0], 64);
  _tile_stored(1, square[1], 64);
  _tile_stored(2, square[2], 64);
  _tile_stored(3, square[3], 64);
  for (int i = 0; i < 4; ++i) {
    transpose(square[i]);
    for (int r = 0; r < rows; ++r) store(scores + r * kScoreRow + i * kPanel, square[i][r]);
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

// Two rows of 32 numbers as two tile rows of 16 pairs. Interleaving works within 128 bits: two moves restore the order.
inline void interleave(__m512i even, __m512i odd, BFloat16* first, BFloat16* second) {
  const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
  _mm512_storeu_si512(first, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high));
  _mm512_storeu_si512(second, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high));
}

// 64 values as tiles of pairs of keys: 32 keys after 32 keys, each D / 16 tiles. From `stop` on they are 0.
void pack_values(const KVTile& tile, BFloat16* to) {
  const auto& [values, begin, stop, last] = tile;
  const int size = values.head_size;
  for (int key = begin; key < begin + kTile; key += kPanel) {
    const BFloat16* row = key < stop ? values.at(key) : nullptr;
    const BFloat16* const ahead = key + kTile < last ? values.at(key + kTile) : nullptr;
    BFloat16* const tiles = to + (key - begin) / kDepth * kDepth * size + (key - begin) % kDepth / 2 * kDepth;
    for (int i = 0; i < kPanel; i += 2, row += 2 * size) {
      if (ahead != nullptr && i * size % 512 == 0) prefetch(ahead + i * size);
      for (int d = 0; d < size; d += kDepth) {
        const __m512i even = key + i < stop ? _mm512_loadu_si512(row + d) : __m512i{};
        const __m512i odd = key + i + 1 < stop ? _mm512_loadu_si512(row + size + d) : __m512i{};
        BFloat16* const at = tiles + d / kPanel * kTileElements + i / 2 * kDepth;
        interleave(even, odd, at, at + kTileElements);
      }
    }
  }
}

}  // namespace
