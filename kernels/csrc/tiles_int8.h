// What attention in AMX tiles multiplies over int8 caches, but for rows of prompts (tiles.h): memory, and which product
// when.
#pragma once

#include "int8_few.h"

namespace {

// Keys and values as they are stored, queries and weights as integers: see int8_products.h.
class Int8Operands {
 public:
  static constexpr int kRowsAtOnce = kPanel, kMostFew = 8;

  Int8Operands(const AttentionParams& p, Arena& arena) : p_(p), size_(p.head_size) {
    arena.take(query_, (most_rows(p) * kQueryParts + kPanel) * size_);
    arena.take(query_scales_, most_rows(p));
    arena.take(keys_, int64_t{kSplit} * size_);
    arena.take(values_, int64_t{kSplit} * size_);
    arena.take(key_scales_, kSplit);
    arena.take(value_scales_, kSplit);
    arena.take(sums_, kQueryParts * kPanel * kSumRow);
    arena.take(weights_, kWeightParts * kPanel * kWeightBytesRow);
    arena.take(scaled_, kMostFew * kScoreRow);
    arena.take(out_sums_, kWeightParts * kPanel * int64_t{size_});
  }

  static void restore(float* row, int head_size) { restore_bytes_order(row, head_size); }

  void start(const Segment& s, const Row* rows, int count) {
    few_ = count <= kMostFew ? count : 0;
    configure_many();
    key_rows_ = paged_rows<int8_t>(p_, s, p_.key_cache, p_.key_page_stride, p_.key_head_stride);
    value_rows_ = paged_rows<int8_t>(p_, s, p_.value_cache, p_.value_page_stride, p_.value_head_stride);
    scale_rows_ = paged_scales(p_, s);
    const int together = few_ > 0 ? kFour : kPanel;
    for (int first = 0; first < count; first += together) {
      const int panel = few_ > 0 ? kFour : min(kPanel, count - first);
      for (int r = first; r < min(first + panel, count); ++r) {
        int8_t* const to = query_ + (kQueryParts * first + r - first) * size_;
        query_scales_[r] = with_query(p_, rows[r], [&](auto* query) {
          return split_query(query, sign_of_scale(p_), size_, panel * size_, to);
        });
      }
    }
    for (int r = 0; r < few_; r += kFour)
      for (int d = 0; d < size_; d += kBytes)
        transpose_fours(query_ + kQueryParts * r * size_ + d, size_, {}, keys_ + few_tiles(r) + d * kPanel);
  }

  void read(int begin, int stop, int last, int at, float* scores) {
    load_scales(scale_rows_.keys, begin, stop, last, key_scales_ + at);
    load_scales(scale_rows_.values, begin, stop, last, value_scales_ + at);
    for (int r = 0; r < few_; r += kFour)
      score_four(key_rows_, begin, stop, last, keys_ + few_tiles(r), min(kFour, few_ - r), key_scales_ + at,
                 scores + r * kScoreRow + at);
    if (few_ > 0) return;
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
    float* const to = scaled_ + (few_ > 0 ? r * kScoreRow : 0);
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
    inverses_[r] = inverse_of(factors_[r]);
    if (few_ == 0)
      pack_weights(to, broadcast(inverses_[r]), count, rows * int64_t{kWeightBytesRow}, weights_ + r * kWeightBytesRow);
    return state;
  }

  void sees_nothing(int r, int rows, int count) {
    for (int part = 0; part < kWeightParts; ++part) memset(weights_ + (part * rows + r) * kWeightBytesRow, 0, count);
    factors_[r] = inverses_[r] = 0;
    if (few_ > 0) memset(scaled_ + r * kScoreRow, 0, sizeof(float) * count);
  }

  // Of the split's positions [begin, stop): the columns are in the order of packed values.
  void sum_values(int begin, int stop, int last, int rows, int count, float* out) {
    for (int r = 0; r < few_; r += kFour)
      sum_four(value_rows_, begin, stop, last,
               {scaled_ + r * kScoreRow, inverses_ + r, factors_ + r, min(kFour, few_ - r)}, out + r * size_);
    if (few_ > 0) return;
    multiply_bytes<false>({weights_, kWeightBytesRow, values_, int64_t{kTile} * size_, kTileBytes, count / kTile,
                           out_sums_, size_},
                          kWeightParts * rows, size_);
    for (int r = 0; r < rows; ++r)
      add_weight_parts(out_sums_ + r * size_, rows * int64_t{size_}, size_, factors_[r], out + r * size_);
  }

 private:
  // Where the tiles of four rows' queries begin.
  int few_tiles(int row) const { return row / kFour * kPanel * size_; }

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
  float* scaled_;        // [few rows, kScoreRow]: weights times the values' scales; many rows: of one
  int32_t* out_sums_;    // [parts, rows, D]
  float factors_[kPanel], inverses_[kPanel];  // of a row's integers, and of its weights before
};

}  // namespace
