// Attention over bfloat16 and int8 caches with AMX: a block of query rows takes the keys split by split (256). Within a split
// all scores come first, then the weights from their true maximum, then the values. Weights are rounded to bfloat16 for
// their product with the values; sums of them and statistics stay float32. Queries that are not bfloat16 count as the
// sum of two bfloat16 numbers (16 bits). Int8 keys and values become bfloat16 as they are, which is exact; their scales
// multiply the scores, and the weights before they are rounded.
#pragma once

#include "rows.h"
#include "tile_products.h"

namespace {

inline bool fits_tiles(const AttentionParams& p) {
  return (p.cache_dtype == DType::kBFloat16 || p.cache_dtype == DType::kInt8) && p.head_size % kTile == 0;
}

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

struct TileScratch {
  BFloat16 *query;    // [rows, D / 32, parts, 32]
  BFloat16 *keys;     // few rows: the query's tiles, transposed; many: those of the split's keys
  BFloat16 *values;   // tiles of the split's values, rows in pairs; few rows: of 64 of them at a time
  BFloat16 *weights;  // [32, kWeightRow]
  BFloat16 *widened;  // [64, D]: a tile of int8 keys or values
  float *key_scales, *value_scales;  // [kSplit]: of int8 caches
  float *scores;      // [32, kScoreRow]
  float *out;         // [32, D]: of one split, columns as packed
  float *total_out;   // [rows, D], likewise
  Softmax* total;     // [rows]
  Row* rows;

  explicit TileScratch(const AttentionParams& p, float* memory) : start_(memory), next_(memory) {
    const int64_t count = round_up(max(kMaxRowsPerBlock, group_size(p)), 2 * kPanel), size = p.head_size;
    take(query, count * size * 2);
    take(keys, kSplit * size);
    take(values, kSplit * size);
    take(weights, 2 * kPanel * kWeightRow);
    take(widened, kTile * size);
    take(key_scales, kSplit);
    take(value_scales, kSplit);
    take(scores, 2 * kPanel * kScoreRow);
    take(out, 2 * kPanel * size);
    take(total_out, count * size);
    take(total, count);
    take(rows, count);
  }

  int64_t floats() const { return next_ - start_; }

 private:
  template <typename T>
  void take(T*& array, int64_t count) {  // each on a cache line of its own
    array = reinterpret_cast<T*>(next_);
    next_ += (count * int64_t{sizeof(T)} + 63) / 64 * (64 / int64_t{sizeof(float)});
  }
  float *start_, *next_;
};

inline int query_parts(const AttentionParams& p) { return p.query_dtype == DType::kBFloat16 ? 1 : 2; }

// The head's numbers as bfloat16 and what that leaves over, times the sign of the scale (0 if it is 0): its size
// multiplies the scores.
template <typename T>
void split_query(const T* query, float sign, int parts, int head_size, BFloat16* to) {
  for (int d = 0; d < head_size; d += kLanes) {
    BFloat16* const at = to + d / kDepth * parts * kDepth + d % kDepth;
    const Float x = load_wide(query + d) * sign;
    store(at, x);
    if (parts > 1) store(at + kDepth, x - load_wide(at));
  }
}

void load_query_tiles(const AttentionParams& p, const Row& row, BFloat16* to) {
  const int64_t at = row.token * p.query_token_stride + row.head * p.query_head_stride;
  const float sign = (p.scale > 0) - (p.scale < 0);
  const int parts = query_parts(p);
  switch (p.query_dtype) {
    case DType::kBFloat16: return split_query(static_cast<const BFloat16*>(p.query) + at, sign, parts, p.head_size, to);
    case DType::kFloat16: return split_query(static_cast<const Float16*>(p.query) + at, sign, parts, p.head_size, to);
    default: return split_query(static_cast<const float*>(p.query) + at, sign, parts, p.head_size, to);
  }
}

// The scores of one row become weights 2^(c (s - m)), in bfloat16 and with statistics also in place; keys outside
// [lo, hi) get 0, up to `count`, a multiple of 64. Sums run in two chains over vectors counted from the split's start.
// With `value_scales` the bfloat16 weights, and they alone, are multiplied by them.
template <bool kWithStats, bool kScaled>
Softmax weigh(float* scores, BFloat16* weights, const float* value_scales, int lo, int hi, int count, float c) {
  for (int j = 0; (lo > 0 || hi < count) && j < count; j += kLanes) {
    const Int key = lane_index() + j;
    store(scores + j, (key >= lo) & (key < hi) ? load(scores + j) : broadcast(kMasked));
  }
  Float highest[4];
  for (int i = 0; i < 4; ++i) highest[i] = load(scores + i * kLanes);
  for (int j = kTile; j < count; j += kTile)
    for (int i = 0; i < 4; ++i) highest[i] = max(load(scores + j + i * kLanes), highest[i]);
  const float m = max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
  Float l[2] = {}, u[2] = {};
  for (int j = 0; j < count; j += kDepth) {
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
    if constexpr (kScaled)
      for (int half = 0; half < 2; ++half) weight[half] = weight[half] * load(value_scales + j + half * kLanes);
    const __m512bh both = _mm512_cvtne2ps_pbh(weight[1], weight[0]);
    memcpy(weights + j, &both, sizeof both);
  }
  Softmax state;
  state.m = m * c;
  state.l = sum(l[0] + l[1]);
  if constexpr (kWithStats) state.u = sum(u[0] + u[1]);
  return state;
}

// Base-2 logarithms of the masses of the split's pages. Pages do not straddle splits.
void write_page_masses(const AttentionParams& p, const Row& row, const float* weights, int begin, int hi, float m) {
  float* masses = row.page_masses(p);
  for (int page = begin / p.page_size; page * p.page_size < begin + hi; ++page) {
    const int first = max(0, page * p.page_size - begin), last = min(hi, (page + 1) * p.page_size - begin);
    masses[page] = log2f(sum_between(weights, first, last)) + m;
  }
}

// Weights and softmax states, from their scores, of up to 32 rows from row `first` of the block on: keys [begin, stop).
template <bool kWithStats, bool kScaled>
void weigh_panels(const AttentionParams& p, const TileScratch& scratch, int first, int rows, int begin, int stop,
                   Softmax* part) {
  const int count = round_up(stop - begin, kTile);
  const float c = (p.scale == 0 ? 1 : fabsf(p.scale)) * kLog2E;  // not 0: what is masked must stay so
  for (int r = 0; r < rows; ++r) {
    const Row& row = scratch.rows[first + r];
    const int lo = max(0, row.visible_begin - begin), hi = min(stop, row.position + 1) - begin;
    float* const scores = scratch.scores + r * kScoreRow;
    BFloat16* const weights = scratch.weights + r * kWeightRow;
    part[r] = Softmax();
    if (lo >= hi) {
      memset(weights, 0, sizeof(BFloat16) * count);
      continue;
    }
    if constexpr (kScaled) multiply_by(scratch.key_scales, count, scores);
    part[r] = weigh<kWithStats, kScaled>(scores, weights, scratch.value_scales, lo, hi, count, c);
    if constexpr (kWithStats) {
      add_sink_and_recent(row, scores, begin, lo, hi, part[r]);
      keep_weights(p, row, scores, begin, count, part[r].m);
      if (p.page_masses != nullptr) write_page_masses(p, row, scores, begin, hi, part[r].m);
    }
  }
}

template <int kParts>
void score_many(const TileScratch& scratch, int first, int rows, int count, int head_size) {
  const int64_t width = head_size * kParts, tiles = head_size / kDepth;
  multiply<kParts>({scratch.query + first * width, width, scratch.keys, kTileElements, tiles * kTileElements,
                    static_cast<int>(tiles), scratch.scores, kScoreRow},
                   rows, count);
}

void sum_values(const TileScratch& scratch, int rows, int count, int head_size) {
  multiply<1>({scratch.weights, kWeightRow, scratch.values, kDepth * head_size, kTileElements, count / kDepth, scratch.out,
               head_size},
              rows, head_size);
}

// out [rows, D], in the order of packed columns, of a few rows: weights x values of positions [begin, stop).
template <typename T>
void sum_few(const PagedRows<T>& values, int begin, int stop, int last, const TileScratch& scratch) {
  const int64_t size = values.head_size, row_bytes = size * int64_t{sizeof(float)};
  for (int d = 0; d < size; d += 4 * kPanel) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int key = begin; key < stop; key += kTile)
      add_values(tile_of(values, key, stop, last, scratch.widened), d, scratch.weights + key - begin, scratch.values);
    float* const out = scratch.out + d;
    _tile_stored(2, out, row_bytes);
    _tile_stored(3, out + kPanel, row_bytes);
    _tile_stored(4, out + 2 * kPanel, row_bytes);
    _tile_stored(5, out + 3 * kPanel, row_bytes);
  }
}

struct FewRows {
  void (*configure)();
  void (*score[2])(const KVTile&, const BFloat16*, int, float*);  // of queries of one and of two parts
};

template <int kColumns>
constexpr FewRows kFewRows = {configure_few<kColumns>, {score_few<1, kColumns>, score_few<2, kColumns>}};

inline void configure_many() { configure_tiles({kFull, kFull, kFull, kFull, kFull, kFull, kFull, kFull}); }

template <typename T, bool kWithStats>
void run_tiles(const AttentionParams& p, const Segment& s, const TileScratch& scratch, float* workspace) {
  const int rows = s.num_positions * group_size(p), size = p.head_size, parts = query_parts(p);
  const bool few = rows <= kPanel;
  const FewRows& narrowest = rows <= 4 ? kFewRows<4> : rows <= 8 ? kFewRows<8> : kFewRows<16>;
  const int end = s.first_position + s.num_positions;  // no row sees position `end` or beyond
  const int last = min(end, s.tile_end * kTile);
  const auto keys = paged_rows<T>(p, s, p.key_cache, p.key_page_stride, p.key_head_stride);
  const auto values = paged_rows<T>(p, s, p.value_cache, p.value_page_stride, p.value_head_stride);
  constexpr bool kScaled = sizeof(T) == sizeof(int8_t);
  const TileScales scales = paged_scales(p, s);
  for (int r = 0; r < rows; ++r) {
    scratch.rows[r] = Row(p, s, r);
    load_query_tiles(p, scratch.rows[r], scratch.query + r * size * parts);
    scratch.total[r] = Softmax();
  }
  if (few) {
    narrowest.configure();
    for (int d = 0; d < size * parts; d += kDepth)
      transpose_pairs(scratch.query + d, size * parts, scratch.keys + d * kPanel);
  } else {
    configure_many();
  }
  memset(scratch.total_out, 0, sizeof(float) * rows * size);
  for (int tile = s.tile_begin; tile < s.tile_end;) {
    const int split = tile / kTilesPerSplit, begin = tile * kTile;
    tile = min((split + 1) * kTilesPerSplit, s.tile_end);
    const int stop = min(tile * kTile, end);
    for (int key = begin; key < stop; key += kTile) {
      const int at = key - begin;
      const KVTile key_tile = tile_of(keys, key, stop, last, scratch.widened);
      if (few) {
        narrowest.score[parts - 1](key_tile, scratch.keys, rows, scratch.scores + at);
      } else {
        pack_keys(key_tile, scratch.keys + at * size);
        const KVTile value_tile = tile_of(values, key, stop, last, scratch.widened);
        for (int first = 0; first < kTile; first += kDepth)
          for (int d = 0; d < size; d += 4 * kPanel)
            pack_values(value_tile, first, d, scratch.values + (at + first) * size + d * kDepth);
      }
      if constexpr (kScaled) {
        load_scales(scales.keys, key, stop, last, scratch.key_scales + at);
        load_scales(scales.values, key, stop, last, scratch.value_scales + at);
      }
    }
    for (int first = 0; first < rows; first += 2 * kPanel) {
      const int panel_rows = min(2 * kPanel, rows - first);
      const int panel_stop = min(stop, scratch.rows[first + panel_rows - 1].position + 1);
      const int count = max(0, round_up(panel_stop - begin, kTile));
      if (!few) {
        if (parts == 1) score_many<1>(scratch, first, panel_rows, count, size);
        else score_many<2>(scratch, first, panel_rows, count, size);
      }
      Softmax part[2 * kPanel];
      weigh_panels<kWithStats, kScaled>(p, scratch, first, panel_rows, begin, begin + count, part);
      if (few) {
        sum_few(values, begin, stop, last, scratch);
      } else {
        sum_values(scratch, panel_rows, count, size);
      }
      for (int r = 0; r < panel_rows; ++r) {
        const float* const out = scratch.out + r * size;
        if (s.is_partial) {
          const int64_t index = split - s.tile_begin / kTilesPerSplit;
          float* const slot = workspace + s.workspace_offset + (index * rows + first + r) * partial_floats(p);
          memcpy(slot, out, sizeof(float) * size);
          *reinterpret_cast<Softmax*>(slot + size) = part[r];
        } else {
          merge(scratch.total[first + r], scratch.total_out + (first + r) * size, part[r], out, size);
        }
      }
    }
  }
  if (s.is_partial) return;
  for (int r = 0; r < rows; ++r) {
    restore_order(scratch.total_out + r * size, size);
    finish_row(p, scratch.rows[r], scratch.total[r], scratch.total_out + r * size);
  }
}

}  // namespace
