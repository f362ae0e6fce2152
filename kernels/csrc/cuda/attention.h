// Paged causal attention for a mixed batch: one block of four warps walks its segments of the plan.
//
// Up to 16 query rows (a decode): all warps hold the same rows and each takes its slice of every tile, so the loop
// needs no block barrier. More rows: 16 per warp, and every warp takes all slices. A segment ends in parts, one per
// warp; they are merged in shared memory, and when other blocks hold the rest of the row block, in the workspace by the
// last to arrive.
#pragma once

#include "warp_rows.h"

namespace pagestream::gpu {

// The parts of one row, in key order.
struct Parts {
  const float *first, *second;
  int64_t stride;  // from the second part on
  int count;

  DEVICE const float* at(int i) const { return i == 0 ? first : second + (i - 1) * stride; }
};

// The union of a row's parts, held by one warp: lane i has output pairs i, i + 32 ... The order of the sums is the
// order of the keys, whichever block or warp does it.
template <typename T, int kHeadSize, typename Stats>
class MergedRow {
  static constexpr int kPairs = (kHeadSize / 2 + kWarpSize - 1) / kWarpSize;

 public:
  DEVICE explicit MergedRow(const Parts& parts) : lane_(thread_index() % kWarpSize) {
    for (int i = lane_; i < parts.count; i += kWarpSize) m_ = larger(m_, parts.at(i)[0]);
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) m_ = larger(m_, shuffle_xor(m_, mask));
#pragma unroll 4
    for (int i = 0; i < parts.count; ++i) add(parts.at(i));
  }

  DEVICE void store(float* part) const {
    if (lane_ == 0) {
      part[0] = m_;
      part[1] = l_;
      if constexpr (Stats::kEnabled) stats_.write_state(part);
    }
    for_each_pair([&](int i, int column) {
      part[kStateFloats + column] = out_[i][0];
      part[kStateFloats + column + 1] = out_[i][1];
    });
  }

  DEVICE void write(const GpuParams& p, const Row& row) const {
    T* out = static_cast<T*>(p.out) + row.token * p.out_token_stride + row.head * p.out_head_stride;
    for_each_pair([&](int i, int column) {
      *reinterpret_cast<uint32_t*>(out + column) = pack(out_[i][0] / l_, out_[i][1] / l_, T{});
    });
    if constexpr (Stats::kEnabled) stats_.write(p, row, m_, l_);
  }

 private:
  DEVICE void add(const float* part) {
    const float shift = part[0] - m_, weight = exp2(shift);
    l_ = fma(weight, part[1], l_);
    if constexpr (Stats::kEnabled) stats_.add(part, weight, shift);
    for_each_pair([&](int i, int column) {
      out_[i][0] = fma(weight, part[kStateFloats + column], out_[i][0]);
      out_[i][1] = fma(weight, part[kStateFloats + column + 1], out_[i][1]);
    });
  }

  template <typename Use>
  DEVICE void for_each_pair(Use use) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (const int column = 2 * (lane_ + i * kWarpSize); column < kHeadSize) use(i, column);
  }

  const int lane_;
  float m_ = kMasked, l_ = 0;
  float out_[kPairs][2] = {};
  typename Stats::Merged stats_;
};

// T: of query and output. Cache: T, or Float8.
template <typename T, typename Cache, int kHeadSize, typename Stats>
class AttentionBlock {
  using Shape = TileShape<Cache, kHeadSize>;
  using Merged = MergedRow<T, kHeadSize, Stats>;
  static constexpr int kPart = kStateFloats + kHeadSize;  // floats of one row's part
  static_assert(kWarps * kWarpRows * kPart * int{sizeof(float)} <= Shape::kSharedBytes,
                "parts reuse the tiles' memory");

 public:
  static constexpr int kSharedBytes = Shape::kSharedBytes + int{sizeof(Walk)};

  DEVICE AttentionBlock(const GpuParams& p, unsigned char* shared)
      : p_(p),
        shared_(shared),
        warp_(thread_index() / kWarpSize),
        walk_(*reinterpret_cast<Walk*>(shared + Shape::kSharedBytes)) {}

  DEVICE void run() {
    if (thread_index() == 0) walk_.begin(p_, block_index());
    block_barrier();
    while (!walk_.done()) {
      const Segment& segment = walk_.now();
      attend(segment);
      const Sequence sequence(p_, segment.sequence);  // not before: it would keep registers through the loop
      if (segment.is_whole()) {
        merge_warps(segment, sequence,
                    [&](int row, const Merged& merged) { merged.write(p_, row_at(segment, sequence, row)); });
      } else {
        float* part = my_part(segment);
        merge_warps(segment, sequence, [&](int row, const Merged& merged) { merged.store(part + row * kPart); });
        if (is_last_to_arrive(segment)) merge_blocks(segment, sequence);
      }
      block_barrier();  // the next segment's tiles go where these parts are
      if (thread_index() == 0) walk_.next(p_);
      block_barrier();
    }
  }

 private:
  // Leaves one part per warp in shared memory.
  DEVICE void attend(const Segment& segment) {
    const Sequence sequence(p_, segment.sequence);
    const bool wide = sequence.is_wide();
    const int first_row = segment.row_block * kWideRows + (wide ? warp_ * kWarpRows : 0);
    const KeyRange visible = keys_of_block(sequence, segment.row_block, p_.window);
    KvRing<Cache, kHeadSize> ring(p_, reinterpret_cast<Cache*>(shared_), segment, visible);
    const int first_tile = visible.first_tile() + segment.tile, end = first_tile + segment.num_tiles;
    int32_t page = ring.page_of(first_tile);
    const auto copy_next = [&](int tile) {
      if (tile < end) {
        ring.start_copy(tile, page, (tile - first_tile) % Shape::kStages);
        page = ring.page_of(tile + 1);  // known by the time the next copy needs it
      }
      commit_copies();  // also an empty group: the count below is of groups
    };
    for (int i = 0; i < Shape::kStages - 1; ++i) copy_next(first_tile + i);
    WarpRows<T, Cache, kHeadSize, Stats> rows(p_, sequence, segment.kv_head, first_row);
    for (int tile = first_tile; tile < end; ++tile) {
      wait_copies<Shape::kStages - 2>();
      // Shows the copies to their readers, and says that all readers have left the stage that is filled next.
      if (wide) block_barrier(); else warp_barrier();
      copy_next(tile + Shape::kStages - 1);
      for (int slice = wide ? 0 : warp_; slice < kWarps; slice += wide ? 1 : kWarps) {
        const int key = tile * kTileKeys + slice * kSliceKeys;
        if (rows.sees_slice(key)) rows.attend(ring, (tile - first_tile) % Shape::kStages, slice, key);
      }
    }
    wait_copies<0>();
    block_barrier();
    rows.write_part(reinterpret_cast<float*>(shared_) + warp_ * kWarpRows * kPart, segment.kv_head);
    block_barrier();
  }

  // Calls use(row of the row block, merged) with the parts that attend left.
  template <typename Use>
  DEVICE void merge_warps(const Segment& segment, const Sequence& sequence, Use use) const {
    const int64_t stride = kWarpRows * kPart;
    for (int row = warp_; row < num_rows(segment, sequence); row += kWarps) {
      const float* first = reinterpret_cast<const float*>(shared_) + row * kPart;
      use(row, Merged(Parts{first, first + stride, stride, sequence.is_wide() ? 1 : kWarps}));
    }
  }

  // Called by all threads of every block with a part of the row block, when the part is stored.
  DEVICE bool is_last_to_arrive(const Segment& segment) const {
    int32_t* flag = reinterpret_cast<int32_t*>(shared_);
    const int first = first_block(segment), others = last_block(segment) - first;
    block_barrier();  // the whole part is stored, and nobody reads shared memory any more
    if (thread_index() == 0) {
      int32_t* arrivals = p_.workspace.arrivals + first;
      *flag = arrive(arrivals) == others;
      if (*flag) *arrivals = 0;  // for the next layer
    }
    block_barrier();
    return *flag;
  }

  DEVICE void merge_blocks(const Segment& segment, const Sequence& sequence) const {
    const int first = first_block(segment);
    const int64_t stride = int64_t{2} * kWideRows * kPart;
    const float* first_part = part_of(first, segment.block_at > range_begin(*p_.workspace.plan, first));
    const float* second_part = part_of(first + 1, false);
    for (int row = warp_; row < num_rows(segment, sequence); row += kWarps) {
      const Parts parts{first_part + row * kPart, second_part + row * kPart, stride, last_block(segment) - first + 1};
      Merged(parts).write(p_, row_at(segment, sequence, row));
    }
  }

  DEVICE int first_block(const Segment& segment) const { return block_of_tile(*p_.workspace.plan, segment.block_at); }
  DEVICE int last_block(const Segment& segment) const {
    return block_of_tile(*p_.workspace.plan, segment.block_at + segment.block_tiles - 1);
  }
  // A block's range begins inside a shared row block, or ends inside one that begins within the range.
  DEVICE float* part_of(int block, bool begins_within) const {
    return p_.workspace.parts + (int64_t{2} * block + begins_within) * kWideRows * kPart;
  }
  DEVICE float* my_part(const Segment& segment) const {
    return part_of(block_index(), segment.at > range_begin(*p_.workspace.plan, block_index()));
  }

  DEVICE static int num_rows(const Segment& segment, const Sequence& sequence) {
    return smaller(kWideRows, sequence.num_rows() - segment.row_block * kWideRows);
  }
  DEVICE Row row_at(const Segment& segment, const Sequence& sequence, int row) const {
    return Row(p_, sequence, segment.kv_head, segment.row_block * kWideRows + row);
  }

  const GpuParams& p_;
  unsigned char* shared_;
  const int warp_;
  Walk& walk_;
};

}  // namespace pagestream::gpu
