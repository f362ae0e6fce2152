// Tiles of 64 keys and values on their way from pages to tensor-core operands.
#pragma once

#include "plan.h"

namespace pagestream::gpu {

template <typename T, int kHeadSize>
struct TileShape {
  static constexpr int kChunk = 16 / sizeof(T);  // elements of one copy
  static constexpr int kRowChunks = kHeadSize / kChunk;
  // An odd number of 16-byte chunks per row puts the 8 rows of a matrix load into 8 different groups of banks.
  static constexpr int kPitch = (kRowChunks | 1) * kChunk;
  static constexpr int kSliceElements = kSliceKeys * kPitch;
  static constexpr int kStageElements = 2 * kWarps * kSliceElements;  // keys, then values
  // As many stages as leave room for three blocks on a multiprocessor with 228 KB of shared memory; never under two.
  static constexpr int kStageBudget = 74 << 10;
  static constexpr int kFitting = kStageBudget / (kStageElements * int{sizeof(T)});
  static constexpr int kStages = kFitting < 2 ? 2 : kFitting;
  static constexpr int kSharedBytes = kStages * kStageElements * int{sizeof(T)};
};

// A ring of stages. Warp w copies slice w of every tile: with one tensor-core tile of query rows it is also the only
// reader of that slice, and no block barrier is needed.
template <typename T, int kHeadSize>
class KvRing {
  using Shape = TileShape<T, kHeadSize>;

 public:
  DEVICE KvRing(const GpuParams& p, T* shared, const Segment& segment, const KeyRange& visible)
      : p_(p),
        shared_(shared),
        segment_(segment),
        visible_(visible),
        lane_(thread_index() % kWarpSize),
        warp_(thread_index() / kWarpSize) {}

  // The page that holds this warp's slice of a tile; not read where no row looks.
  DEVICE int32_t page_of(int tile) const {
    const int key = tile * kTileKeys + warp_ * kSliceKeys;
    if (!visible_.touches(key, kSliceKeys)) return 0;
    return p_.block_tables[segment_.sequence * p_.block_table_stride + (key >> p_.page_shift)];
  }

  // Keys outside the visible range become zeros: their slots may hold anything, and 0 * NaN is NaN.
  DEVICE void start_copy(int tile, int32_t page, int stage) {
    const int key = tile * kTileKeys + warp_ * kSliceKeys;
    if (!visible_.touches(key, kSliceKeys)) return;
    const int64_t offset = (key & (p_.page_size - 1)) * int64_t{kHeadSize};
    const T* keys = static_cast<const T*>(p_.key_cache) + segment_.kv_head * p_.key_head_stride +
                    page * p_.key_page_stride + offset;
    const T* values = static_cast<const T*>(p_.value_cache) + segment_.kv_head * p_.value_head_stride +
                      page * p_.value_page_stride + offset;
    T* slice = shared_ + stage * Shape::kStageElements + warp_ * Shape::kSliceElements;
#pragma unroll
    for (int i = 0; i < kSliceKeys * Shape::kRowChunks / kWarpSize; ++i) {
      const int chunk = lane_ + i * kWarpSize;
      const int row = chunk / Shape::kRowChunks, column = chunk % Shape::kRowChunks * Shape::kChunk;
      const bool valid = visible_.holds(key + row);
      copy_async(slice + row * Shape::kPitch + column, keys + row * kHeadSize + column, valid);
      copy_async(slice + kWarps * Shape::kSliceElements + row * Shape::kPitch + column,
                 values + row * kHeadSize + column, valid);
    }
  }

  // Keys 0-7 (b[0], b[1]) and 8-15 (b[2], b[3]) of a slice, head dimensions 16 step to 16 step + 15.
  DEVICE void load_keys(uint32_t (&b)[4], int stage, int slice, int step) const {
    const int row = lane_ / 16 * 8 + lane_ % 8, column = step * 16 + lane_ / 8 % 2 * 8;
    load_matrices(b, slice_at(stage, slice) + row * Shape::kPitch + column);
  }

  // All 16 keys of a slice, head dimensions 16 step to + 7 (b[0], b[1]) and + 8 to + 15 (b[2], b[3]).
  DEVICE void load_values(uint32_t (&b)[4], int stage, int slice, int step) const {
    const int row = lane_ % 16, column = step * 16 + lane_ / 16 * 8;
    load_matrices_transposed(b, slice_at(stage, kWarps + slice) + row * Shape::kPitch + column);
  }

 private:
  DEVICE const T* slice_at(int stage, int slice) const {
    return shared_ + stage * Shape::kStageElements + slice * Shape::kSliceElements;
  }

  const GpuParams& p_;
  T* shared_;
  const Segment& segment_;  // in shared memory: pointers made of it anew for every tile cost less than registers
  KeyRange visible_;
  int lane_, warp_;
};

}  // namespace pagestream::gpu
