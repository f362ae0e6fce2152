// Attention over bfloat16 caches with AMX: a block of query rows takes the keys split by split (256). Within a split
// all scores come first, then the weights from their true maximum, then the values.
//
// A tile product adds, for every element, the even products of 32 in one chain of fused multiply-adds and the odd ones
// in another, then their sum to the element. So an element's bits depend on its row and its column alone, and not on
// which of the two factors is which: a few rows (a decode) read keys as they lie in the page, many transpose them once.
// Weights are rounded to bfloat16 for their product with the values; sums of them and statistics stay float32. Queries
// that are not bfloat16 count as the sum of two bfloat16 numbers (16 bits).
#pragma once

#include "amx.h"
#include "rows.h"

namespace {

constexpr int kSplit = kTile * kTilesPerSplit;  // keys
constexpr int kPanel = 16;                      // rows of a tile register
constexpr int kDepth = 32;                      // bfloat16 numbers in one of its rows
constexpr int kTileElements = kPanel * kDepth;

constexpr Tiles::Shape kFull{kPanel, kDepth * sizeof(BFloat16)};

inline bool fits_tiles(const AttentionParams& p) {
  return p.cache_dtype == DType::kBFloat16 && p.head_size % kDepth == 0;
}

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// C (32 x 32, or the upper 16 rows of it) = A B in `steps` steps of kDepth. A is row-major; for each tile row of B it
// has kParts column blocks, whose products are added. B is made of tiles: rows of pairs, b_column apart, b_step on.
template <int kParts, bool kTwoPanels>
inline void multiply(const BFloat16* a, int lda, const BFloat16* b, int64_t b_step, int64_t b_column, int steps,
                     float* c, int ldc) {
  const int64_t row_bytes = lda * int64_t{sizeof(BFloat16)}, out_bytes = ldc * int64_t{sizeof(float)};
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwoPanels) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < steps; ++step, b += b_step) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + b_column, 64);
    for (int part = 0; part < kParts; ++part, a += kDepth) {
      _tile_loadd(4, a, row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwoPanels) {
        _tile_loadd(5, a + kPanel * lda, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, out_bytes);
  _tile_stored(1, c + kPanel, out_bytes);
  if constexpr (kTwoPanels) {
    _tile_stored(2, c + kPanel * ldc, out_bytes);
    _tile_stored(3, c + kPanel * ldc + kPanel, out_bytes);
  }
}

struct TileScratch {
  BFloat16 *query;    // [rows, D / 32, parts, 32]
  BFloat16 *keys;     // few rows: the query's tiles, transposed; many: those of the split's keys
  BFloat16 *values;   // tiles of the split's values, rows in pairs
  BFloat16 *weights;  // [32, kSplit]
  float *scores;      // [32, kSplit]
  float *out;         // [32, D]: of one split
  float *total_out;   // [rows, D]
  Softmax* total;     // [rows]
  Row* rows;

  explicit TileScratch(const AttentionParams& p, float* memory) : start_(memory), next_(memory) {
    const int64_t count = round_up(max(kMaxRowsPerBlock, group_size(p)), 2 * kPanel), size = p.head_size;
    take(query, count * size * 2);
    take(keys, kSplit * size);
    take(values, kSplit * size);
    take(weights, 2 * kPanel * kSplit);
    take(scores, 2 * kPanel * kSplit);
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

// The head's numbers as bfloat16 and what that leaves over, with the sign of the scale: its size multiplies the scores.
template <typename T>
void split_query(const T* query, bool negate, int parts, int head_size, BFloat16* to) {
  for (int d = 0; d < head_size; ++d) {
    const float x = negate ? -to_float(query[d]) : to_float(query[d]);
    BFloat16* const at = to + d / kDepth * parts * kDepth + d % kDepth;
    from_float(x, at[0]);
    if (parts > 1) from_float(x - to_float(at[0]), at[kDepth]);
  }
}

void load_query_tiles(const AttentionParams& p, const Row& row, BFloat16* to) {
  const int64_t at = row.token * p.query_token_stride + row.head * p.query_head_stride;
  const bool negate = p.scale < 0;
  const int parts = query_parts(p);
  switch (p.query_dtype) {
    case DType::kBFloat16: return split_query(static_cast<const BFloat16*>(p.query) + at, negate, parts, p.head_size, to);
    case DType::kFloat16: return split_query(static_cast<const Float16*>(p.query) + at, negate, parts, p.head_size, to);
    default: return split_query(static_cast<const float*>(p.query) + at, negate, parts, p.head_size, to);
  }
}

// A tile of 16 rows of 32 numbers, transposed as 16 x 16 pairs: row i of the result holds pair i of every row.
inline void transpose_pairs(const BFloat16* from, int64_t row_stride, BFloat16* to) {
  Float square[kPanel];
  for (int i = 0; i < kPanel; ++i) memcpy(&square[i], from + i * row_stride, sizeof(Float));
  transpose(square);
  for (int i = 0; i < kPanel; ++i) memcpy(to + i * kDepth, &square[i], sizeof(Float));
}

// Into L2, 16 rows that lie together. One phase of a split fetches what the next one reads: 32 KiB ahead at D 64.
inline void prefetch_rows(const PagedRows<BFloat16>& rows, int position, int end) {
  if (position >= end) return;
  const char* start = reinterpret_cast<const char*>(rows.at(position));
  for (int byte = 0; byte < kPanel * rows.head_size * int{sizeof(BFloat16)}; byte += 64)
    __builtin_prefetch(start + byte, 0, 2);
}

// scores[row][key] of at most 16 rows, whose transposed tiles are `query`. Keys go in as they lie in their page.
void score_few(const PagedRows<BFloat16>& keys, const PagedRows<BFloat16>& values, int begin, int stop,
               const BFloat16* query, int parts, int rows, float* scores) {
  finish_stores();
  for (int key = begin; key < stop; key += kPanel) {
    const BFloat16 *const block = keys.at(key), *q = query;
    _tile_zero(0);
    for (int d = 0; d < keys.head_size; d += kDepth) {
      _tile_loadd(4, block + d, keys.head_size * sizeof(BFloat16));
      for (int part = 0; part < parts; ++part, q += kTileElements) {
        _tile_loadd(6, q, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
    }
    prefetch_rows(values, key, stop);
    Float square[kPanel];  // key by row
    _tile_stored(0, square, 64);
    transpose(square);
    for (int r = 0; r < rows; ++r) store(scores + r * kSplit + key - begin, square[r]);
  }
}

// The split's keys as tiles of pairs by key: 16 keys after 16 keys, each D / 32 tiles.
void pack_keys(const PagedRows<BFloat16>& keys, int begin, int stop, BFloat16* to) {
  for (int key = begin; key < stop; key += kPanel) {
    const BFloat16* const block = keys.at(key);
    for (int d = 0; d < keys.head_size; d += kDepth, to += kTileElements)
      transpose_pairs(block + d, keys.head_size, to);
  }
}

// The split's values as tiles of pairs of keys: 32 keys after 32 keys, each D / 16 tiles. From `stop` on they are 0.
void pack_values(const PagedRows<BFloat16>& values, const PagedRows<BFloat16>& keys, int begin, int stop, int end,
                 BFloat16* to) {
  const int size = values.head_size;
  for (int key = begin; key < stop; key += kDepth, to += kDepth * size) {
    for (int half = 0; half < kDepth; half += kPanel) prefetch_rows(keys, key + half + kSplit, end);
    for (int pair = 0; pair < kDepth / 2; ++pair) {
      const int first = key + 2 * pair;
      const BFloat16* const row = first < stop ? values.at(first) : nullptr;
      for (int d = 0; d < size; d += kPanel) {
        UShort even{}, odd{};
        if (first < stop) memcpy(&even, row + d, sizeof even);
        if (first + 1 < stop) memcpy(&odd, row + size + d, sizeof odd);
        const UInt both = __builtin_convertvector(even, UInt) | __builtin_convertvector(odd, UInt) << 16;
        memcpy(to + d / kPanel * kTileElements + pair * kDepth, &both, sizeof both);
      }
    }
  }
}

// The scores of one row become weights 2^(c (s - m)), in bfloat16 and with statistics also in place; keys outside
// [lo, hi) get 0, up to `count`, a multiple of 32. Sums run in two chains over vectors counted from the split's start.
template <bool kWithStats>
Softmax weigh(float* scores, BFloat16* weights, int lo, int hi, int count, float c) {
  for (int j = 0; j < count; j += kLanes) {
    if (j >= lo && j + kLanes <= hi) continue;
    const Int key = lane_index() + j;
    store(scores + j, (key >= lo) & (key < hi) ? load(scores + j) : broadcast(kMasked));
  }
  Float largest = load(scores);
  for (int j = kLanes; j < count; j += kLanes) largest = max(load(scores + j), largest);
  const float m = max(largest);
  Float l[2] = {}, u[2] = {};
  for (int j = 0; j < count; j += kDepth) {
    Float weight[2];
    for (int half = 0; half < 2; ++half) {
      const Float d = clamp_exponent((load(scores + j + half * kLanes) - m) * c);
      weight[half] = exp2(d);
      l[half] += weight[half];
      if constexpr (kWithStats) {
        u[half] = fma(weight[half], d, u[half]);
        store(scores + j + half * kLanes, weight[half]);
      }
    }
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

// Scores, weights and output of up to 32 rows from row `first` of the block on, over the keys [begin, stop).
template <bool kWithStats>
void attend_panels(const AttentionParams& p, const TileScratch& scratch, int first, int rows, int begin, int stop,
                   Softmax* part) {
  const int count = round_up(stop - begin, kDepth);
  const float c = fabsf(p.scale) * kLog2E;
  for (int r = 0; r < rows; ++r) {
    const Row& row = scratch.rows[first + r];
    const int lo = max(0, row.visible_begin - begin), hi = min(stop, row.position + 1) - begin;
    float* const scores = scratch.scores + r * kSplit;
    BFloat16* const weights = scratch.weights + r * kSplit;
    part[r] = Softmax();
    if (lo >= hi) {
      memset(weights, 0, sizeof(BFloat16) * count);
      continue;
    }
    part[r] = weigh<kWithStats>(scores, weights, lo, hi, count, c);
    if constexpr (kWithStats) {
      add_sink_and_recent(row, scores, begin, lo, hi, part[r]);
      if (p.page_masses != nullptr) write_page_masses(p, row, scores, begin, hi, part[r].m);
    }
  }
}

template <int kParts>
void score_many(const TileScratch& scratch, int first, int rows, int count, int head_size) {
  const BFloat16* const query = scratch.query + int64_t{first} * head_size * kParts;
  const int tiles = head_size / kDepth;
  const auto multiply_all = rows > kPanel ? multiply<kParts, true> : multiply<kParts, false>;
  for (int j = 0; j < count; j += kDepth)
    multiply_all(query, head_size * kParts, scratch.keys + int64_t{j} * head_size, kTileElements,
                 tiles * kTileElements, tiles, scratch.scores + j, kSplit);
}

void sum_values(const TileScratch& scratch, int rows, int count, int head_size) {
  const auto multiply_all = rows > kPanel ? multiply<1, true> : multiply<1, false>;
  for (int d = 0; d < head_size; d += kDepth)
    multiply_all(scratch.weights, kSplit, scratch.values + d / kPanel * kTileElements, kDepth * head_size,
                 kTileElements, count / kDepth, scratch.out + d, head_size);
}

template <bool kWithStats>
void run_tiles(const AttentionParams& p, const Segment& s, const TileScratch& scratch, float* workspace) {
  const int rows = s.num_positions * group_size(p), size = p.head_size, parts = query_parts(p);
  const bool few = rows <= kPanel;
  const int end = s.first_position + s.num_positions;  // no row sees position `end` or beyond
  const auto keys = paged_rows<BFloat16>(p, s, p.key_cache, p.key_page_stride, p.key_head_stride);
  const auto values = paged_rows<BFloat16>(p, s, p.value_cache, p.value_page_stride, p.value_head_stride);
  for (int r = 0; r < rows; ++r) {
    scratch.rows[r] = Row(p, s, r);
    load_query_tiles(p, scratch.rows[r], scratch.query + r * size * parts);
    scratch.total[r] = Softmax();
  }
  if (few)
    for (int d = 0; d < size * parts; d += kDepth)
      transpose_pairs(scratch.query + d, size * parts, scratch.keys + d * kPanel);
  memset(scratch.total_out, 0, sizeof(float) * rows * size);
  for (int tile = s.tile_begin; tile < s.tile_end;) {
    const int split = tile / kTilesPerSplit, begin = tile * kTile;
    tile = min((split + 1) * kTilesPerSplit, s.tile_end);
    const int stop = min(tile * kTile, end), count = round_up(stop - begin, kDepth);
    if (few) {
      score_few(keys, values, begin, stop, scratch.keys, parts, rows, scratch.scores);
    } else {
      pack_keys(keys, begin, stop, scratch.keys);
    }
    pack_values(values, keys, begin, stop, min(end, s.tile_end * kTile), scratch.values);
    for (int first = 0; first < rows; first += 2 * kPanel) {
      const int panel_rows = min(2 * kPanel, rows - first);
      if (!few) {
        if (parts == 1) score_many<1>(scratch, first, panel_rows, count, size);
        else score_many<2>(scratch, first, panel_rows, count, size);
      }
      Softmax part[2 * kPanel];
      attend_panels<kWithStats>(p, scratch, first, panel_rows, begin, stop, part);
      sum_values(scratch, panel_rows, count, size);
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
  for (int r = 0; r < rows; ++r) finish_row(p, scratch.rows[r], scratch.total[r], scratch.total_out + r * size);
}

}  // namespace
