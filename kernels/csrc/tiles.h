// Attention over bfloat16 and int8 caches with AMX: a block of query rows takes the keys split by split (256). Within a
// split all scores come first, then the weights from their true maximum, then the values. Statistics, sums of weights
// are float32; what multiplies keys and values, in which arithmetic, is the matter of Bf16Operands and Int8Operands.
// Over int8 caches rows of prompts are bfloat16's and all others integers': many rows share what is widened once, a
// decode waits for it. As with linear layers a row's bits follow its kind, never its company.
#pragma once

#include "tile_products.h"
#include "tiles_int8.h"

namespace {

inline bool fits_tiles(const AttentionParams& p) {
  return (p.cache_dtype == DType::kBFloat16 || p.cache_dtype == DType::kInt8) && p.head_size % kTile == 0;
}

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

// out [rows, D], in the order of packed columns, of a few rows: weights x values of positions [begin, stop).
inline void sum_few(const PagedRows<BFloat16>& values, int begin, int stop, int last, const BFloat16* weights,
                    BFloat16* packed, float* to) {
  const int64_t size = values.head_size, row_bytes = size * int64_t{sizeof(float)};
  for (int d = 0; d < size; d += 4 * kPanel) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int key = begin; key < stop; key += kTile)
      add_values({values, key, stop, last}, d, weights + key - begin, packed);
    float* const out = to + d;
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

// Keys, values, queries and weights as bfloat16. Queries that are not count as the sum of two such numbers (16 bits).
// Int8 keys and values (T) become bfloat16 as they are, which is exact; their scales multiply the scores, and the weights
// before they are rounded.
template <typename T>
class Bf16Operands {
 public:
  static constexpr int kRowsAtOnce = 2 * kPanel;
  static constexpr bool kScaled = sizeof(T) == sizeof(int8_t);

  Bf16Operands(const AttentionParams& p, Arena& arena) : p_(p), size_(p.head_size), parts_(query_parts(p)) {
    arena.take(query_, most_rows(p) * size_ * 2);
    arena.take(keys_, int64_t{kSplit} * size_);
    arena.take(values_, int64_t{kSplit} * size_);
    arena.take(weights_, kRowsAtOnce * kWeightRow);
    arena.take(widened_, kScaled ? int64_t{kTile} * size_ : 0);
    arena.take(key_scales_, kScaled ? kSplit : 0);
    arena.take(value_scales_, kScaled ? kSplit : 0);
  }

  static void restore(float* row, int head_size) { restore_order(row, head_size); }

  void start(const Segment& s, const Row* rows, int count) {
    few_ = count <= kPanel && !kScaled ? count : 0;
    narrowest_ = few_ <= 4 ? &kFewRows<4> : few_ <= 8 ? &kFewRows<8> : &kFewRows<16>;
    (few_ > 0 ? narrowest_->configure : configure_many)();
    key_rows_ = paged_rows<T>(p_, s, p_.key_cache, p_.key_page_stride, p_.key_head_stride);
    value_rows_ = paged_rows<T>(p_, s, p_.value_cache, p_.value_page_stride, p_.value_head_stride);
    scale_rows_ = paged_scales(p_, s);
    const int width = size_ * parts_;
    for (int r = 0; r < count; ++r)
      with_query(p_, rows[r], [&](auto* query) {
        split_query(query, sign_of_scale(p_), parts_, size_, query_ + r * width);
      });
    for (int d = 0; few_ > 0 && d < width; d += kDepth) transpose_pairs(query_ + d, width, keys_ + d * kPanel);
  }

  // Positions [begin, begin + 64), `at` in their split.
  void read(int begin, int stop, int last, int at, float* scores) {
    const KVTile keys = tile_of(key_rows_, begin, stop, last, widened_);
    if (few_ > 0) return narrowest_->score[parts_ - 1](keys, keys_, few_, scores + at);
    pack_keys(keys, keys_ + at * size_);
    if constexpr (kScaled) {
      load_scales(scale_rows_.keys, begin, stop, last, key_scales_ + at);
      load_scales(scale_rows_.values, begin, stop, last, value_scales_ + at);
    }
    const KVTile values = tile_of(value_rows_, begin, stop, last, widened_);
    for (int first = 0; first < kTile; first += kDepth)
      for (int d = 0; d < size_; d += 4 * kPanel)
        pack_values(values, first, d, values_ + (at + first) * size_ + d * kDepth);
  }

  void score(int first, int rows, int count, float* scores) {
    if (few_ > 0) return;
    const int64_t width = size_ * parts_, tiles = size_ / kDepth;
    (parts_ == 1 ? multiply<1> : multiply<2>)({query_ + first * width, width, keys_, kTileElements,
                                               tiles * kTileElements, static_cast<int>(tiles), scores, kScoreRow},
                                              rows, count);
  }

  template <bool kWithStats>
  Softmax weigh_row(int /*first*/, int r, int /*rows*/, float* scores, int lo, int hi, int count, float c) {
    BFloat16* const to = weights_ + r * kWeightRow;
    const float* const scales = value_scales_;
    if constexpr (kScaled) multiply_by(key_scales_, count, scores);
    return weigh<kWithStats>(scores, lo, hi, count, c, [to, scales](int j, const Float (&weight)[2]) {
      __m512bh both;
      if constexpr (kScaled)
        both = _mm512_cvtne2ps_pbh(weight[1] * load(scales + j + kLanes), weight[0] * load(scales + j));
      else
        both = _mm512_cvtne2ps_pbh(weight[1], weight[0]);
      memcpy(to + j, &both, sizeof both);
    });
  }

  void sees_nothing(int r, int /*rows*/, int count) { memset(weights_ + r * kWeightRow, 0, sizeof(BFloat16) * count); }

  // Of the split's positions [begin, stop): the columns are in the order of packed values.
  void sum_values(int begin, int stop, int last, int rows, int count, float* out) {
    if constexpr (!kScaled)
      if (few_ > 0) return sum_few(value_rows_, begin, stop, last, weights_, values_, out);
    multiply<1>({weights_, kWeightRow, values_, int64_t{kDepth} * size_, kTileElements, count / kDepth, out, size_},
                rows, size_);
  }

 private:
  const AttentionParams& p_;
  const int size_, parts_;
  int few_ = 0;  // rows, if they are few
  const FewRows* narrowest_ = nullptr;
  PagedRows<T> key_rows_, value_rows_;
  TileScales scale_rows_;
  BFloat16* query_;    // [rows, D / 32, parts, 32]
  BFloat16* keys_;     // few rows: the query's tiles, transposed; many: those of the split's keys
  BFloat16* values_;   // tiles of the split's values, rows in pairs; few rows: of 64 of them at a time
  BFloat16* weights_;  // [32, kWeightRow]
  BFloat16* widened_;  // [64, D]: a tile of int8 keys or values
  float *key_scales_, *value_scales_;  // [kSplit]
};

template <typename Operands>
struct TileScratch {
  Arena arena;
  Operands operands;
  float *scores;     // [32, kScoreRow]
  float *out;        // [32, D]: of one split, columns as packed
  float *total_out;  // [rows, D], likewise
  Softmax* total;    // [rows]
  Row* rows;

  TileScratch(const AttentionParams& p, float* memory) : arena{memory}, operands(p, arena) {
    arena.take(scores, 2 * kPanel * kScoreRow);
    arena.take(out, int64_t{2} * kPanel * p.head_size);
    arena.take(total_out, most_rows(p) * p.head_size);
    arena.take(total, most_rows(p));
    arena.take(rows, most_rows(p));
  }
};

template <typename Operands>
int64_t scratch_floats_of(const AttentionParams& p) {
  return TileScratch<Operands>(p, nullptr).arena.next - static_cast<const float*>(nullptr);
}

inline int64_t tile_scratch_floats(const AttentionParams& p) {
  if (p.cache_dtype == DType::kBFloat16) return scratch_floats_of<Bf16Operands<BFloat16>>(p);
  const int64_t prompts = scratch_floats_of<Bf16Operands<int8_t>>(p), answers = scratch_floats_of<Int8Operands>(p);
  return prompts > answers ? prompts : answers;
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
template <bool kWithStats, typename Operands>
void weigh_panels(const AttentionParams& p, TileScratch<Operands>& scratch, int first, int rows, int begin, int stop,
                  Softmax* part) {
  const int count = round_up(stop - begin, kTile);
  const float c = (p.scale == 0 ? 1 : fabsf(p.scale)) * kLog2E;
  for (int r = 0; r < rows; ++r) {
    const Row& row = scratch.rows[first + r];
    const int lo = max(0, row.visible_begin - begin), hi = min(stop, row.position + 1) - begin;
    float* const scores = scratch.scores + r * kScoreRow;
    part[r] = Softmax();
    if (lo >= hi) {
      scratch.operands.sees_nothing(r, rows, count);
      continue;
    }
    part[r] = scratch.operands.template weigh_row<kWithStats>(first, r, rows, scores, lo, hi, count, c);
    if constexpr (kWithStats) {
      add_sink_and_recent(row, scores, begin, lo, hi, part[r]);
      keep_weights(p, row, scores, begin, count, part[r].m);
      if (p.page_masses != nullptr) write_page_masses(p, row, scores, begin, hi, part[r].m);
    }
  }
}

template <typename Operands, bool kWithStats>
void run_tiles(const AttentionParams& p, const Segment& s, TileScratch<Operands>& scratch, float* workspace) {
  constexpr int kRowsAtOnce = Operands::kRowsAtOnce;
  const int rows = s.num_positions * group_size(p), size = p.head_size;
  const int end = s.first_position + s.num_positions;  // no row sees position `end` or beyond
  const int last = min(end, s.tile_end * kTile);
  for (int r = 0; r < rows; ++r) {
    scratch.rows[r] = Row(p, s, r);
    scratch.total[r] = Softmax();
  }
  scratch.operands.start(s, scratch.rows, rows);
  memset(scratch.total_out, 0, sizeof(float) * rows * size);
  for (int tile = s.tile_begin; tile < s.tile_end;) {
    const int split = tile / kTilesPerSplit, begin = tile * kTile;
    tile = min((split + 1) * kTilesPerSplit, s.tile_end);
    const int stop = min(tile * kTile, end);
    for (int key = begin; key < stop; key += kTile)  // in the order in which memory holds a page
      scratch.operands.read(key, stop, last, key - begin, scratch.scores);
    for (int first = 0; first < rows; first += kRowsAtOnce) {
      const int panel_rows = min(kRowsAtOnce, rows - first);
      const int panel_stop = min(stop, scratch.rows[first + panel_rows - 1].position + 1);
      const int count = max(0, round_up(panel_stop - begin, kTile));
      scratch.operands.score(first, panel_rows, count, scratch.scores);
      Softmax part[kRowsAtOnce];
      weigh_panels<kWithStats>(p, scratch, first, panel_rows, begin, begin + count, part);
      scratch.operands.sum_values(begin, stop, last, panel_rows, count, scratch.out);
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
    Operands::restore(scratch.total_out + r * size, size);
    finish_row(p, scratch.rows[r], scratch.total[r], scratch.total_out + r * size);
  }
}

template <typename Operands>
void run_segment_of(const AttentionParams& p, const Segment& s, bool with_stats, float* memory, float* workspace) {
  TileScratch<Operands> scratch(p, memory);
  (with_stats ? run_tiles<Operands, true> : run_tiles<Operands, false>)(p, s, scratch, workspace);
}

inline bool in_integers(const AttentionParams& p, const Segment& s) {
  return p.cache_dtype == DType::kInt8 && s.first_row < p.num_tokens - p.prefill_rows;
}

inline auto tiles_of(const AttentionParams& p, const Segment& s) {
  if (in_integers(p, s)) return run_segment_of<Int8Operands>;
  return p.cache_dtype == DType::kInt8 ? run_segment_of<Bf16Operands<int8_t>> : run_segment_of<Bf16Operands<BFloat16>>;
}

// The columns of an output in their own order, after that of packed values.
inline void restore_order(const AttentionParams& p, const Segment& s, float* row) {
  if (in_integers(p, s)) restore_bytes_order(row, p.head_size);
  else restore_order(row, p.head_size);
}

}  // namespace
