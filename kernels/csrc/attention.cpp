// Paged causal attention on a CPU. Built once per instruction set: PAGESTREAM_ISA names the exported table.
//
// A block of query rows (positions x heads of one KV head) walks the key tiles. Per tile: widen K and V to float32
// once, scores = Q K^T, online softmax, O += P V. Every 256 keys are one split with its own softmax state; splits
// are merged in order, here or, for a block that threads share, in finish().
#include "gemm.h"
#include "observe.h"
#if defined(__AMX_BF16__)
#include "tiles.h"
#endif

namespace {

struct Scratch {
  float *keys, *values, *query, *scores, *part_out, *total_out, *key_scales, *value_scales;
  Softmax *part, *total;

  Scratch(const AttentionParams& p, float* memory) {
    const int rows = max(kMaxRowsPerBlock, group_size(p)), width = padded_head(p);
    auto take = [&memory](int64_t floats) { return (memory += floats) - floats; };
    keys = take(int64_t{width} * kTile);
    values = take(int64_t{width} * kTile);
    query = take(int64_t{rows} * width);
    scores = take(int64_t{rows} * kTile);
    part_out = take(int64_t{rows} * width);
    total_out = take(int64_t{rows} * width);
    key_scales = take(kTile);
    value_scales = take(kTile);
    part = reinterpret_cast<Softmax*>(take(rows * int64_t{sizeof(Softmax) / sizeof(float)}));
    total = reinterpret_cast<Softmax*>(take(rows * int64_t{sizeof(Softmax) / sizeof(float)}));
  }
};

int64_t scratch_floats(const AttentionParams& p) {
#if defined(__AMX_BF16__)
  if (fits_tiles(p)) return tile_scratch_floats(p);
#endif
  const int64_t rows = max(kMaxRowsPerBlock, group_size(p)), width = padded_head(p);
  return 2 * (width + 1) * kTile + rows * (3 * width + kTile + 2 * int64_t{sizeof(Softmax) / sizeof(float)});
}

// The scores of one row and tile become weights 2^(s - m); the state takes them in. Keys outside [lo, hi) of the tile
// get weight 0. Returns the factor by which the row's output so far must shrink.
template <bool kWithStats>
float softmax_tile(float* scores, int lo, int hi, Softmax& state) {
  if (lo > 0 || hi < kTile) {
    for (int j = 0; j < kTile; j += kLanes) {
      const Int key = lane_index() + j;
      store(scores + j, (key >= lo) & (key < hi) ? load(scores + j) : broadcast(kMasked));
    }
  }
  Float largest = load(scores);
  for (int j = kLanes; j < kTile; j += kLanes) largest = max(load(scores + j), largest);
  const float tile_m = max(largest);
  const float factor = state.rescale(tile_m > state.m ? tile_m : state.m);
  Float l{}, u{};
  for (int j = 0; j < kTile; j += kLanes) {
    const Float d = clamp_exponent(load(scores + j) - state.m);
    const Float weight = exp2(d);
    store(scores + j, weight);
    l += weight;
    if constexpr (kWithStats) u = fma(weight, d, u);
  }
  state.l += sum(l);
  if constexpr (kWithStats) state.u += sum(u);
  return factor;
}

// Page masses are sums of the split's weights while it is open, and base-2 logarithms of them once it is closed, so
// that later merges need not touch them. Pages do not straddle splits. Positions [begin, end) of the split.
void open_pages(const AttentionParams& p, const Row& row, int begin, int end) {
  float* masses = row.page_masses(p);
  for (int page = begin / p.page_size; page * p.page_size < end; ++page) masses[page] = 0;
}

void close_pages(const AttentionParams& p, const Row& row, int begin, int end, float m) {
  float* masses = row.page_masses(p);
  for (int page = begin / p.page_size; page * p.page_size < end; ++page) masses[page] = log2f(masses[page]) + m;
}

// The sums over the sets of positions that statistics name. `weights` belong to the keys from `begin` on.
void add_masses(const AttentionParams& p, const Row& row, const float* weights, int split_begin, int begin, int lo,
                int hi, float factor, Softmax& state) {
  add_sink_and_recent(row, weights, begin, lo, hi, state);
  if (p.page_masses == nullptr) return;
  float* masses = row.page_masses(p);
  for (int page = split_begin / p.page_size; page * p.page_size < begin; ++page) masses[page] *= factor;
  for (int j = 0; j < hi; j += kLanes) masses[(begin + j) / p.page_size] += sum(load(weights + j));
}

template <typename T>
void read_row(const T* query, float factor, float* to, int head_size) {
  for (int d = 0; d < head_size; ++d) to[d] = to_float(query[d]) * factor;
}

void load_query(const AttentionParams& p, const Row& row, float* to) {
  const int64_t at = row.token * p.query_token_stride + row.head * p.query_head_stride;
  const float factor = p.scale * kLog2E;
  switch (p.query_dtype) {
    case DType::kFloat32: return read_row(static_cast<const float*>(p.query) + at, factor, to, p.head_size);
    case DType::kBFloat16: return read_row(static_cast<const BFloat16*>(p.query) + at, factor, to, p.head_size);
    case DType::kFloat16: return read_row(static_cast<const Float16*>(p.query) + at, factor, to, p.head_size);
  }
}

// part_out (+)= weights x values of the tile. Few rows widen the values in registers; many share a widened tile. Either
// way an output sums its keys in order, so the bits are the same.
template <typename T>
void add_values(const PagedRows<T>& value_rows, int begin, int end, int rows, int width, const Scratch& scratch,
                bool accumulate) {
  const int depth = min(kTile, end - begin);
  if (rows > kBlockRows || width != value_rows.head_size) {
    load_values(value_rows, begin, end, scratch.values, width);
    gemm(scratch.scores, kTile, scratch.values, width, scratch.part_out, width, rows, width, depth, accumulate);
    return;
  }
  const int run = min(kTile, 1 << value_rows.page_shift);
  for (int j = 0; j < depth; j += run) {
    for (int i = 0; i < run; ++i) prefetch_row(value_rows, begin + kTile + j + i, end);
    gemm(scratch.scores + j, kTile, value_rows.at(begin + j), width, scratch.part_out, width, rows, width,
         min(run, depth - j), accumulate || j > 0);
  }
}

template <typename T, bool kWithStats>
void run_segment(const AttentionParams& p, const Segment& s, const Scratch& scratch, float* workspace) {
  const int rows = s.num_positions * group_size(p), width = padded_head(p);
  const bool with_pages = kWithStats && p.page_masses != nullptr;
  const int end = s.first_position + s.num_positions;  // no row sees position `end` or beyond
  const auto key_rows = paged_rows<T>(p, s, p.key_cache, p.key_page_stride, p.key_head_stride);
  const auto value_rows = paged_rows<T>(p, s, p.value_cache, p.value_page_stride, p.value_head_stride);
  constexpr bool kScaled = sizeof(T) == sizeof(int8_t);
  const TileScales scales = paged_scales(p, s);
  for (int r = 0; r < rows; ++r) {
    load_query(p, Row(p, s, r), scratch.query + r * p.head_size);
    scratch.total[r] = Softmax();
  }
  memset(scratch.total_out, 0, sizeof(float) * rows * width);
  for (int tile = s.tile_begin; tile < s.tile_end;) {
    const int split_begin = tile, split_end = min((tile / kTilesPerSplit + 1) * kTilesPerSplit, s.tile_end);
    const auto visible_end = [&](const Row& row) { return min(split_end * kTile, row.position + 1); };
    for (int r = 0; r < rows; ++r) {
      scratch.part[r] = Softmax();
      const Row row(p, s, r);
      if (with_pages) open_pages(p, row, split_begin * kTile, visible_end(row));
    }
    for (; tile < split_end; ++tile) {
      const int begin = tile * kTile;
      load_keys(key_rows, begin, end, scratch.keys);
      if constexpr (kScaled) {
        load_scales(scales.keys, begin, end, end, scratch.key_scales);
        load_scales(scales.values, begin, end, end, scratch.value_scales);
      }
      gemm(scratch.query, p.head_size, scratch.keys, kTile, scratch.scores, kTile, rows, kTile, p.head_size, false);
      for (int r = 0; r < rows; ++r) {
        const Row row(p, s, r);
        const int lo = max(0, row.visible_begin - begin), hi = min(kTile, row.position + 1 - begin);
        float* scores = scratch.scores + r * kTile;
        if (lo >= hi) {
          memset(scores, 0, sizeof(float) * kTile);
          continue;
        }
        if constexpr (kScaled) multiply_by(scratch.key_scales, kTile, scores);
        const float factor = softmax_tile<kWithStats>(scores, lo, hi, scratch.part[r]);
        float* o = scratch.part_out + r * width;
        if (tile > split_begin && factor != 1)
          for (int d = 0; d < width; d += kLanes) store(o + d, load(o + d) * factor);
        if constexpr (kWithStats)
          add_masses(p, row, scores, split_begin * kTile, begin, lo, hi, factor, scratch.part[r]);
        if constexpr (kWithStats) keep_weights(p, row, scores, begin, kTile, scratch.part[r].m);
        if constexpr (kScaled) multiply_by(scratch.value_scales, kTile, scores);
      }
      add_values(value_rows, begin, end, rows, width, scratch, tile > split_begin);
    }
    for (int r = 0; r < rows; ++r) {
      const Row row(p, s, r);
      if (with_pages) close_pages(p, row, split_begin * kTile, visible_end(row), scratch.part[r].m);
      if (s.is_partial) {
        const int64_t split = split_begin / kTilesPerSplit - s.tile_begin / kTilesPerSplit;
        float* slot = workspace + s.workspace_offset + (split * rows + r) * partial_floats(p);
        memcpy(slot, scratch.part_out + r * width, sizeof(float) * width);
        *reinterpret_cast<Softmax*>(slot + width) = scratch.part[r];
      } else {
        merge(scratch.total[r], scratch.total_out + r * width, scratch.part[r], scratch.part_out + r * width, width);
      }
    }
  }
  if (s.is_partial) return;
  for (int r = 0; r < rows; ++r) finish_row(p, Row(p, s, r), scratch.total[r], scratch.total_out + r * width);
}

// Whether statistics are asked of some row of the segment.
bool with_stats(const AttentionParams& p, const Segment& s) {
  if (p.observed == nullptr) return p.stats != nullptr || p.page_masses != nullptr;
  for (int i = 0; i < s.num_positions; ++i)
    if (p.observed[s.first_row + i] >= 0) return true;
  return false;
}

void run(const AttentionParams& p, const Segment* segments, int64_t count, float* memory, float* workspace) {
#if defined(__AMX_BF16__)
  if (fits_tiles(p)) {
    for (int64_t i = 0; i < count; ++i)
      tiles_of(p, segments[i])(p, segments[i], with_stats(p, segments[i]), memory, workspace);
    _tile_release();
    return;
  }
#endif
  const Scratch scratch(p, memory);
  using Run = void (*)(const AttentionParams&, const Segment&, const Scratch&, float*);
  constexpr Run kRun[4][2] = {{run_segment<float, false>, run_segment<float, true>},
                              {run_segment<BFloat16, false>, run_segment<BFloat16, true>},
                              {run_segment<Float16, false>, run_segment<Float16, true>},
                              {run_segment<int8_t, false>, run_segment<int8_t, true>}};
  const Run* const runs = kRun[static_cast<int>(p.cache_dtype)];
  for (int64_t i = 0; i < count; ++i) runs[with_stats(p, segments[i])](p, segments[i], scratch, workspace);
}

void finish(const AttentionParams& p, const Segment& block, float* total_out, const float* workspace) {
  const int rows = block.num_positions * group_size(p), width = padded_head(p);
  const int splits = (block.tile_end - 1) / kTilesPerSplit - block.tile_begin / kTilesPerSplit + 1;
  for (int r = 0; r < rows; ++r) {
    Softmax total;
    memset(total_out, 0, sizeof(float) * width);
    for (int64_t split = 0; split < splits; ++split) {
      const float* slot = workspace + block.workspace_offset + (split * rows + r) * partial_floats(p);
      merge(total, total_out, *reinterpret_cast<const Softmax*>(slot + width), slot, width);
    }
#if defined(__AMX_BF16__)
    if (fits_tiles(p)) restore_order(p, block, total_out);
#endif
    finish_row(p, Row(p, block, r), total, total_out);
  }
}

}  // namespace

extern "C" const pagestream::AttentionKernel PAGESTREAM_ISA = {scratch_floats, partial_floats, run, finish, observe};
