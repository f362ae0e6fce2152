// Who does what. The work of a call is a list of KV tiles: sequences, in each its KV heads, in each its row blocks, in
// each the tiles that the rows see. Blocks of threads take equal contiguous ranges of that list (stream-K), so none
// waits for the longest sequence. The list is never stored: a range is its first tile, and lengths say how to go on.
#pragma once

#include <machine.h>

#include "params.h"

namespace pagestream::gpu {

DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

// The query rows of a sequence and KV head, (position, head of the group) with the head fastest, in tensor-core tiles:
// up to 16 rows share one tile and the warps split the keys; more come in blocks of 64, 16 rows per warp.
struct Sequence {
  int32_t first_row, context, query_length, group;

  DEVICE Sequence(const AttentionParams& p, int s)
      : first_row(p.query_starts[s]),
        context(p.context_lengths[s]),
        query_length(p.query_starts[s + 1] - first_row),
        group(p.num_heads / p.num_kv_heads) {}

  DEVICE int num_rows() const { return query_length * group; }
  DEVICE bool is_wide() const { return num_rows() > kWarpRows; }
  DEVICE int num_row_blocks() const { return (num_rows() + kWideRows - 1) / kWideRows; }
  DEVICE int position(int row) const { return context - query_length + row / group; }
};

// Keys [begin, end) that at least one of the rows [first, last] attends to.
struct KeyRange {
  int begin, end;

  DEVICE KeyRange(const Sequence& sequence, int first, int last, int window)
      : begin(window > 0 ? larger(0, sequence.position(first) - window + 1) : 0), end(sequence.position(last) + 1) {}

  DEVICE bool touches(int key, int count) const { return key < end && key + count > begin; }
  DEVICE bool holds(int key) const { return key >= begin && key < end; }
  DEVICE int first_tile() const { return begin / kTileKeys; }
  DEVICE int num_tiles() const { return (end + kTileKeys - 1) / kTileKeys - first_tile(); }
};

DEVICE KeyRange keys_of_block(const Sequence& sequence, int row_block, int window) {
  const int first = row_block * kWideRows, last = smaller(first + kWideRows, sequence.num_rows()) - 1;
  return KeyRange(sequence, first, last, window);
}

DEVICE int64_t tiles_per_head(const AttentionParams& p, int s) {
  const Sequence sequence(p, s);
  int64_t tiles = 0;
  for (int block = 0; block < sequence.num_row_blocks(); ++block)
    tiles += keys_of_block(sequence, block, p.window).num_tiles();
  return tiles;
}

// First tile of block i's range, and which block has tile `tile`.
DEVICE int range_begin(const Plan& plan, int64_t i) {
  return static_cast<int>(plan.total_tiles * i / plan.num_blocks);
}
DEVICE int block_of_tile(const Plan& plan, int64_t tile) {
  return static_cast<int>(((tile + 1) * plan.num_blocks - 1) / plan.total_tiles);
}

// A part of one row block, by one block of threads: tiles [tile, tile + num_tiles) of the row block's.
struct Segment {
  int sequence, kv_head, row_block, tile, num_tiles;
  int at;           // of its first tile in the list
  int block_at;     // of its row block's first tile
  int block_tiles;  // of the whole row block
  DEVICE bool is_whole() const { return num_tiles == block_tiles; }
};

// Walks the segments of one block of threads. Lies in shared memory, where it costs no registers; one thread steps it.
class Walk {
 public:
  DEVICE void begin(const GpuParams& p, int block) {
    const Plan& plan = *p.workspace.plan;
    now_ = {};
    end_ = 0;
    if (block >= plan.num_blocks) return;
    const Start& start = p.workspace.starts[block];
    now_.sequence = start.sequence;
    now_.kv_head = start.kv_head;
    now_.row_block = start.row_block;
    now_.tile = start.tile;
    now_.at = range_begin(plan, block);
    end_ = range_begin(plan, block + 1);
    measure(p);
  }

  DEVICE bool done() const { return now_.at >= end_; }
  DEVICE const Segment& now() const { return now_; }

  DEVICE void next(const GpuParams& p) {
    now_.at += now_.num_tiles;
    now_.tile = 0;
    ++now_.row_block;
    if (!done()) measure(p);
  }

 private:
  // Steps over the ends of heads and sequences, then counts the tiles.
  DEVICE void measure(const GpuParams& p) {
    while (now_.row_block >= Sequence(p, now_.sequence).num_row_blocks()) {
      now_.row_block = 0;
      if (++now_.kv_head < p.num_kv_heads) continue;
      now_.kv_head = 0;
      ++now_.sequence;
      while (Sequence(p, now_.sequence).num_rows() == 0) ++now_.sequence;
    }
    now_.block_tiles = keys_of_block(Sequence(p, now_.sequence), now_.row_block, p.window).num_tiles();
    now_.block_at = now_.at - now_.tile;
    now_.num_tiles = smaller(end_ - now_.at, now_.block_tiles - now_.tile);
  }

  Segment now_;
  int end_;
};

// The plan kernel, one block of kPlanThreads: writes Plan and every Start, and clears the arrival counters. Each thread
// counts a run of sequences, a scan gives the runs their places in the list, then each Start is looked up in it.
class Planner {
 public:
  DEVICE Planner(const GpuParams& p, int64_t* run_ends)
      : p_(p), run_ends_(run_ends), run_((p.num_sequences + kPlanThreads - 1) / kPlanThreads) {}

  DEVICE void run() {
    const int me = thread_index();
    int64_t mine = 0;
    for (int s = me * run_; s < smaller((me + 1) * run_, p_.num_sequences); ++s)
      mine += tiles_per_head(p_, s) * p_.num_kv_heads;
    run_ends_[me] = mine;
    scan(me);
    const Workspace& workspace = p_.workspace;
    const int64_t total = run_ends_[kPlanThreads - 1];
    const int64_t useful = (total + kMinTilesPerBlock - 1) / kMinTilesPerBlock;
    const int num_blocks = useful < workspace.max_blocks ? static_cast<int>(useful) : workspace.max_blocks;
    const Plan plan{static_cast<int32_t>(total), num_blocks};
    if (me == 0) *workspace.plan = plan;
    for (int block = me; block < workspace.max_blocks; block += kPlanThreads) {
      workspace.arrivals[block] = 0;
      if (block < num_blocks) workspace.starts[block] = find(range_begin(plan, block));
    }
  }

 private:
  DEVICE void scan(int me) {
    for (int distance = 1; distance < kPlanThreads; distance *= 2) {
      block_barrier();
      const int64_t before = me >= distance ? run_ends_[me - distance] : 0;
      block_barrier();
      run_ends_[me] += before;
    }
    block_barrier();
  }

  DEVICE Start find(int64_t tile) const {
    int low = 0, high = kPlanThreads - 1;  // the first run that ends beyond `tile`
    while (low < high) {
      const int middle = (low + high) / 2;
      if (run_ends_[middle] > tile)
        high = middle;
      else
        low = middle + 1;
    }
    if (low > 0) tile -= run_ends_[low - 1];
    int s = low * run_;
    int64_t per_head = tiles_per_head(p_, s);
    while (tile >= per_head * p_.num_kv_heads) {
      tile -= per_head * p_.num_kv_heads;
      per_head = tiles_per_head(p_, ++s);
    }
    const int head = static_cast<int>(tile / per_head);
    tile %= per_head;
    int row_block = 0;
    const Sequence sequence(p_, s);
    for (int tiles; tile >= (tiles = keys_of_block(sequence, row_block, p_.window).num_tiles()); ++row_block)
      tile -= tiles;
    return {s, head, row_block, static_cast<int32_t>(tile)};
  }

  const GpuParams& p_;
  int64_t* run_ends_;
  const int run_;
};

}  // namespace pagestream::gpu
