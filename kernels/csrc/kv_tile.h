// Reads one tile of keys and values through the block table and widens it to float32, once for all rows that use it.
#pragma once

#include "params.h"
#include "vec.h"

namespace {

using pagestream::AttentionParams;
using pagestream::kTile;

// The last vector of a row may be half a vector (head sizes are multiples of 8): the rest reads as 0.
template <typename T>
inline Float load_row(const T* row, int d, int head_size) {
  if (d + kLanes <= head_size) return load_wide(row + d);
  T rest[kLanes] = {};
  for (int i = 0; d + i < head_size; ++i) rest[i] = row[d + i];
  return load_wide(rest);
}

// Where the keys or values of one sequence and KV head lie. kLanes divides the page size, so an aligned group of
// kLanes rows lies in one page.
template <typename T>
struct PagedRows {
  const T* cache;
  const int32_t* pages;  // of this sequence
  int64_t page_stride;
  int page_shift, head_size;  // pages hold 2^page_shift positions

  const T* at(int position) const {
    const int slot = position & ((1 << page_shift) - 1);
    return cache + pages[position >> page_shift] * page_stride + int64_t{slot} * head_size;
  }
};

// One cache line per call of the row that lies one tile ahead: spread through the conversion, it hides most of DRAM.
template <typename T>
inline void prefetch_row(const PagedRows<T>& rows, int position, int end) {
  if (position >= end) return;
  const char* row = reinterpret_cast<const char*>(rows.at(position));
  for (int byte = 0; byte < rows.head_size * int{sizeof(T)}; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

// Columns [d, d + columns) of kLanes rows, transposed to keys[d][j]; returns how many columns it did.
template <typename T>
inline int transpose_columns(const T* block, int d, int head_size, float* keys) {
  Float square[kLanes];
  for (int i = 0; i < kLanes; ++i) square[i] = load_wide(block + i * head_size + d);
  transpose(square);
  for (int i = 0; i < kLanes; ++i) store(keys + i * kTile, square[i]);
  return kLanes;
}

// bfloat16 moves in pairs, as one 32-bit lane: half the shuffles, which are what bounds a transposition.
inline int transpose_columns(const BFloat16* block, int d, int head_size, float* keys) {
  if (d + 2 * kLanes > head_size) return transpose_columns<BFloat16>(block, d, head_size, keys);
  Float square[kLanes];
  for (int i = 0; i < kLanes; ++i) memcpy(&square[i], block + i * head_size + d, sizeof(Float));
  transpose(square);
  for (int i = 0; i < kLanes; ++i) {
    store(keys + 2 * i * kTile, (Float)((UInt)square[i] << 16));
    store(keys + (2 * i + 1) * kTile, (Float)((UInt)square[i] & 0xffff0000u));
  }
  return 2 * kLanes;
}

// keys[d][j]: transposed, so that one vector holds kLanes keys. Slots at and beyond `end` are never read.
template <typename T>
void load_keys(const PagedRows<T>& rows, int begin, int end, float* keys) {
  for (int j = 0; j < kTile; j += kLanes) {
    const int valid = end - begin - j;
    const T* block = valid > 0 ? rows.at(begin + j) : nullptr;
    for (int i = 0; i < kLanes; ++i) prefetch_row(rows, begin + kTile + j + i, end);
    int d = 0;
    while (valid >= kLanes && d + kLanes <= rows.head_size)
      d += transpose_columns(block, d, rows.head_size, keys + d * kTile + j);
    for (; d < rows.head_size; d += kLanes) {
      Float square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = i < valid ? load_row(block + i * rows.head_size, d, rows.head_size) : Float{};
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(keys + (d + i) * kTile + j, square[i]);
    }
  }
}

// values[j][d], `width` floats a row; only slots before `end`.
template <typename T>
void load_values(const PagedRows<T>& rows, int begin, int end, float* values, int width) {
  for (int j = 0; j < kTile && begin + j < end; ++j) {
    const T* row = rows.at(begin + j);
    prefetch_row(rows, begin + kTile + j, end);
    for (int d = 0; d < width; d += kLanes) store(values + j * width + d, load_row(row, d, rows.head_size));
  }
}

constexpr int kScalesAhead = 4 * kTile;  // their lines are few, and all work waits for one

// The scales of a tile's int8 keys or values, one a row; from `end` on they are 0. Fetches those of a later tile, up to
// `last`.
inline void load_scales(const PagedRows<float>& scales, int begin, int end, int last, float* to) {
  for (int j = 0; j < kTile; j += kLanes) {
    const int valid = end - begin - j;
    prefetch_row(scales, begin + kScalesAhead + j, last);
    const float* group = valid > 0 ? scales.at(begin + j) : nullptr;
    if (valid >= kLanes) store(to + j, load(group));
    else
      for (int i = 0; i < kLanes; ++i) to[j + i] = i < valid ? group[i] : 0;
  }
}

// row[j] *= scales[j].
inline void multiply_by(const float* scales, int count, float* row) {
  for (int j = 0; j < count; j += kLanes) store(row + j, load(row + j) * load(scales + j));
}

}  // namespace
