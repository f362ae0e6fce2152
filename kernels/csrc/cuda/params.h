// What the CUDA kernels receive besides AttentionParams, and the layout of the workspace they share.
#pragma once

#include "../params.h"

namespace pagestream::gpu {

constexpr int kThreads = 128;  // per block: 4 warps
constexpr int kWarps = 4;
constexpr int kSliceKeys = 16;  // keys that one warp takes at a time; no page is smaller
constexpr int kTileKeys = 64;   // one slice per warp: the unit of work and of copying
constexpr int kWarpRows = 16;   // query rows of one tensor-core tile
constexpr int kWideRows = 64;   // query rows of a block that has too many for one tile
constexpr int kStateFloats = 8;  // m, l, u, largest, sink, recent of a row's part, padded to keep its output aligned
constexpr int kMinTilesPerBlock = 2;  // less is not worth a merge
constexpr int kPlanThreads = 256;

// Where a block's range of tiles starts. Tiles are counted from the first one that the row block can see.
struct Start {
  int32_t sequence, kv_head, row_block, tile;
};

// Written once per step by the plan kernel, read by all layers.
struct Plan {
  int32_t total_tiles;
  int32_t num_blocks;  // those with work; block i has tiles [total i / n, total (i + 1) / n)
};

// One allocation: Plan, then per block Start, arrival counter, and two parts of kWideRows rows (a block shares at most
// its first and its last row block with others), then the masses of slices where pages hold several.
struct Workspace {
  Plan* plan;
  Start* starts;
  int32_t* arrivals;  // [i]: blocks that finished their part of the row block that crosses the end of block i's range
  float* parts;       // [block][first or last][kWideRows][kStateFloats + D]
  float* slices;      // GpuParams::slice_masses
  int32_t max_blocks;

  static constexpr int64_t kHeaderFloats = 4;

  static int64_t floats(int64_t max_blocks, int64_t head_size) {
    return kHeaderFloats + max_blocks * (4 + 4 + 2 * kWideRows * (kStateFloats + head_size));
  }

  Workspace() = default;
  Workspace(float* memory, int32_t blocks, int64_t head_size) {
    plan = reinterpret_cast<Plan*>(memory);
    starts = reinterpret_cast<Start*>(memory + kHeaderFloats);
    arrivals = reinterpret_cast<int32_t*>(memory + kHeaderFloats + 4 * int64_t{blocks});
    parts = memory + kHeaderFloats + 8 * int64_t{blocks};
    slices = memory + floats(blocks, head_size);
    max_blocks = blocks;
  }
};

struct GpuParams : AttentionParams {
  Workspace workspace;
  float* slice_masses;  // [T, Hq, M * B / 16]: base-2 log of each slice's mass; page_masses itself when B is 16
  int32_t page_shift;   // log2 B
  const float *key_scales, *value_scales;  // [Hkv] or null: a stored number times its head's scale is the key or value
};

struct AppendParams {
  void* heads;                      // [T, Hq + 2 Hkv, D]: query, key, value; the query is replaced
  const float *cos, *signed_sin;    // [T, D]
  const void* norm_weight;          // [Hq + Hkv, D] or null, in the type of heads
  void *key_cache, *value_cache;    // [P, Hkv, B, D], the last two dimensions contiguous
  const int64_t* slots;             // [T]; a slot outside the cache is not stored: padding of a captured graph
  const float *key_scales, *value_scales;  // [Hkv] or null: a stored number times its head's scale is the key or value
  int64_t token_stride, head_stride;
  int64_t key_page_stride, key_head_stride, value_page_stride, value_head_stride;
  int32_t num_tokens, num_heads, num_kv_heads, head_size, num_pages, page_size;
  float epsilon;
  DType dtype, cache_dtype;
};

}  // namespace pagestream::gpu
