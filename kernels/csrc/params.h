// What the kernels receive: pointers, sizes and strides. No framework type appears below bindings.cpp.
#pragma once

#include <cstdint>

namespace pagestream {

// kInt8: caches on a CPU only; kFloat8: e4m3, caches on CUDA only
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8 };

// Every constant below is a position in the sequence, never a function of the batch or of the thread count:
// that is why a row has the same bits alone, in any batch, under any chunking and on any number of threads.
constexpr int kTile = 64;            // keys converted to float32 at a time
constexpr int kTilesPerSplit = 4;    // 256 keys share one softmax state; splits are merged in order
constexpr int kMaxRowsPerBlock = 384;  // query rows (positions x heads of one group) that share a converted tile
constexpr int kBands = 16;           // of distance from a row, each twice as wide as the one before

struct AttentionParams {
  const void* query;        // [T, Hq, D]
  void* out;                // [T, Hq, D]
  const void* key_cache;    // [P, Hkv, B, D], the last two dimensions contiguous
  const void* value_cache;  // likewise
  const float *key_scales, *value_scales;  // of int8 caches: [P, Hkv, B], the last dimension contiguous
  const int32_t* block_tables;     // [S, M]
  const int32_t* query_starts;     // [S + 1]
  const int32_t* context_lengths;  // [S]
  float* stats;                    // [T, Hq, 5], with `observed` [O, Hq, 5], or null
  float* page_masses;              // [T, Hq, M] or null
  int64_t query_token_stride, query_head_stride;
  int64_t out_token_stride, out_head_stride;
  int64_t key_page_stride, key_head_stride;
  int64_t value_page_stride, value_head_stride;
  int64_t key_scale_page_stride, key_scale_head_stride;
  int64_t value_scale_page_stride, value_scale_head_stride;
  int64_t block_table_stride;
  int32_t num_tokens, num_sequences, num_heads, num_kv_heads, head_size;  // T, S, Hq, Hkv, D
  int32_t num_pages, page_size, max_pages;  // P, B, M
  int32_t window;                           // 0: no window
  int32_t prefill_rows;                     // the last of the T rows: of prompts, see tiles.h
  float scale;
  DType query_dtype;  // also of out
  DType cache_dtype;
  // Rows whose weights are kept (CPU): for each of T its place among the O of them, or -1; or null.
  const int32_t* observed;
  float* weights;         // [O, Hq, weight_stride]: 2^(s - shift) of the row's key tiles
  float* weight_shifts;   // [O, Hq, weight_stride / kTile]
  int64_t weight_stride;  // at least the contexts, a multiple of kTile
};

// Consecutive query positions of one sequence and the query heads of one KV head, over the key tiles
// [tile_begin, tile_end). Both ends are split boundaries or the ends of what the rows can see.
struct Segment {
  int32_t sequence, kv_head;
  int32_t first_row;       // in query / out
  int32_t first_position;  // in the sequence
  int32_t num_positions;
  int32_t tile_begin, tile_end;
  bool is_partial;            // part of a block that several threads share
  int64_t workspace_offset;   // floats; where its splits go when it is partial
};

struct ObservedRow {
  int32_t row, sequence;  // its row in the batch and the sequence that has it
  int32_t pages;          // its place in page_masses, or -1: not asked for
};

struct ObservedSpan {
  int32_t observed, begin, end;  // positions of a kept row's context
};

// Of each head of a kept row: what a layer group's sums are made of.
struct HeadRecord {
  float entropy, p_max, sink, recent;
  float first;          // mass on position 0
  float log2_distance;  // sum of p_j log2(n - j) without position 0
  float bands[kBands];
};

// A kept row and one query head, in one layer.
struct ObservedHead {
  ObservedRow row;
  int32_t observed, head;
  int32_t context;            // n
  const float* log2_counts;  // log2_counts[j] = log2(n - j), j < n
  HeadRecord* record;
  float* page_masses;         // [1 + M], or null: the mass on position 0, then on each page
  const ObservedSpan* spans;  // those of the row
  int32_t num_spans;
  float* span_shares;          // [num_spans, 2] at span_stride: mass, share of the head's output
  int64_t span_stride;
};


// One build of attention.cpp for one instruction set.
struct AttentionKernel {
  int64_t (*scratch_floats)(const AttentionParams&);
  int64_t (*partial_floats)(const AttentionParams&);  // one split of one row in the workspace
  void (*run)(const AttentionParams&, const Segment* segments, int64_t count, float* scratch, float* workspace);
  // Merges the stored splits of one shared block, whose tile range covers all of it, and writes its results.
  void (*finish)(const AttentionParams&, const Segment& block, float* scratch, const float* workspace);
  // What statistics say of a kept row and head; its weights become shares.
  void (*observe)(const AttentionParams&, const ObservedHead&);
};

}  // namespace pagestream
