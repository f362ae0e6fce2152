// What attention in AMX tiles multiplies over int8 caches, but for rows of prompts (tiles.h): memory, and which product
// when.
#pragma once

#include "int8_products.h"

namespace {

// Keys and values as they are stored, queries and weights as integers: see int8_products.h.
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

  static void restore(float* row, int head_size) { restore_bytes_order(row, head_size); }

  void start(const Segment& s, const Row* rows, int count) {
    few_ = count <= 8 ? count : 0;
    (few_ == 0 ? configure_many : few_ <= 4 ? configure_few<4, kWeightParts> : configure_few<8, kWeightParts>)();
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
    const int steps = size_ / kBytes;
    for (int tile = 0; few_ > 0 && tile < kQueryParts * steps; ++tile)
      transpose_fours(query_ + tile / steps * few_ * size_ + tile % steps * kBytes, size_, {},
                      keys_ + tile * kTileBytes);
  }

  void read(int begin, int stop, int last, int at, float* scores) {
    load_scales(scale_rows_.keys, begin, stop, last, key_scales_ + at);
    load_scales(scale_rows_.values, begin, stop, last, value_scales_ + at);
    if (few_ > 0) {
      const auto score = few_ <= 4 ? score_few<4> : score_few<8>;
      return score(key_rows_, begin, stop, last, keys_, few_, key_scales_ + at, scores + at);
    }
    pack_keys(key_rows_, begin, stop, last, keys_ + at * size_);
    pack_values(value_rows_, begin, stop, last, values_ + at * size_);
  }

  void score(int first, int rows, int count, float* scores) {
    if (few_ > 0) return;
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
    const float* const scales = value_scales_;
    float* const to = scaled_;
    const auto keep = [scales, to, &largest](int j, const Float (&weight)[2]) {
      for (int half = 0; half < 2; ++half) {
        const int at = j + half * kLanes;
        const Float scaled = weight[half] * load(scales + at);
        largest = (UInt)_mm512_max_epu32((__m512i)largest, (__m512i)scaled);
        store(to + at, scaled);
      }
    };
    const Softmax state = weigh<kWithStats>(scores, lo, hi, count, c * query_scales_[first + r], keep);
    const float most = from_bits(_mm512_reduce_max_epu32((__m512i)largest));
    factors_[r] = most / kLargestWeight;
    pack_weights(scaled_, most, count, rows * int64_t{kWeightBytesRow}, weights_ + r * kWeightBytesRow);
    return state;
  }

  void sees_nothing(int r, int rows, int count) {
    for (int part = 0; part < kWeightParts; ++part) memset(weights_ + (part * rows + r) * kWeightBytesRow, 0, count);
    factors_[r] = 0;
  }

  // Of the split's positions [begin, stop): the columns are in the order of packed values.
  void sum_values(int begin, int stop, int last, int rows, int count, float* out) {
    if (few_ > 0) sum_few(value_rows_, begin, stop, last, weights_, values_, out_sums_);
    else
      multiply_bytes<false>({weights_, kWeightBytesRow, values_, int64_t{kTile} * size_, kTileBytes, count / kTile,
                             out_sums_, size_},
                            kWeightParts * rows, size_);
    for (int r = 0; r < rows; ++r)
      add_weight_parts(out_sums_ + r * size_, rows * int64_t{size_}, size_, factors_[r], out + r * size_);
  }

 private:
  const AttentionParams& p_;
  const int size_;
  int few_ = 0;  // rows, if they are few
  PagedRows<int8_t> key_rows_, value_rows_;
  TileScales scale_rows_;
  int8_t* query_;        // [rows in panels of 16, parts, rows of the panel, D]
  float* query_scales_;  // [rows]
  int8_t* keys_;         // few rows: the query's tiles; many: those of the split's keys
  int8_t* values_;       // tiles of the split's values
  float *key_scales_, *value_scales_;  // [kSplit]
  int32_t* sums_;        // [parts, rows, kSumRow]: of 64 keys
  uint8_t* weights_;     // [parts, rows, kWeightBytesRow]
  float* scaled_;        // [kSplit]: a row's weights times the values' scales
  int32_t* out_sums_;    // [parts, rows, D]
  float factors_[kPanel];  // of a row's integers
};

}  // namespace
