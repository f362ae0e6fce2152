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
  static constexpr int kStages = kFitting < 2 ? 2 : kFitting > 4 ? 4 : kFitting;
  static constexpr int kSharedBytes = kStages * kStageElements * int{sizeof(T)};
};

// A ring of stages. Warp w copies slice w of every tile: with one tensor-core tile of query rows it is also the only
// reader of that slice, and no block barrier is needed.
template <typename T, int kHeadSize>
class KvRing {
  using Shape = TileShape<T, kHeadSize>;
  static constexpr bool kIsFloat8 = sizeof(T) == 1;

 public:
  static constexpr float kExpanded = kIsFloat8 ? 256 : 1;  // stored number over its operand

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
    for (int first = 0; first < kSliceKeys * Shape::kRowChunks; first += kWarpSize) {
      const int chunk = first + lane_;
      if (kSliceKeys * Shape::kRowChunks % kWarpSize != 0 && chunk >= kSliceKeys * Shape::kRowChunks) break;
      const int row = chunk / Shape::kRowChunks, column = chunk % Shape::kRowChunks * Shape::kChunk;
      const bool valid = visible_.holds(key + row);
      copy_async(slice + row * Shape::kPitch + column, keys + row * kHeadSize + column, valid);
      copy_async(slice + kWarps * Shape::kSliceElements + row * Shape::kPitch + column,
                 values + row * kHeadSize + column, valid);
    }
  }

  // Operands for keys 0-7 (b[0], b[1]) and 8-15 (b[2], b[3]) of a slice, head dimensions 16 step to 16 step + 15 in the
  // order of query_column.
  DEVICE void load_keys(uint32_t (&b)[4], int stage, int slice, int step) const {
    const T* keys = slice_at(stage, slice) + step * 16;
    if constexpr (kIsFloat8) {
      uint32_t r[2];
      load_matrices(r, keys + lane_ % 16 * Shape::kPitch);
      expand(r[0], b[0], b[1]);
      expand(r[1], b[2], b[3]);
    } else {
      load_matrices(b, keys + (lane_ / 16 * 8 + lane_ % 8) * Shape::kPitch + lane_ / 8 % 2 * 8);
    }
  }

  // Operands for all 16 keys of a slice and head dimensions 16 step to 16 step + 15, in two halves ordered as in
  // output_column.
  DEVICE void load_values(uint32_t (&b)[4], int stage, int slice, int step) const {
    const T* values = slice_at(stage, kWarps + slice) + lane_ % 16 * Shape::kPitch + step * 16;
    if constexpr (kIsFloat8) {
      uint32_t r[2];
      load_matrices_transposed(r, values);
      expand(r[0], b[0], b[2]);
      expand(r[1], b[1], b[3]);
    } else {
      load_matrices_transposed(b, values + lane_ / 16 * 8);
    }
  }

  // Matrix loads move pairs of bytes. Of e4m3 a lane so gets 4 neighbours instead of two pairs 8 apart, and the head
  // dimensions are multiplied in another order: the sum over them does not care, the query must follow.
  // First head dimension of the two pairs that a lane needs of the query.
  DEVICE static constexpr int query_column(int quad_lane, int i) {
    return kIsFloat8 ? 4 * quad_lane + 2 * i : 2 * quad_lane + 8 * i;
  }
  template <typename Query>
  DEVICE static void arrange_query(uint32_t (&pairs)[2], Query) {
    if constexpr (kIsFloat8) {
      Query x[4];
      memcpy(x, pairs, sizeof x);
      pairs[0] = pack(to_float(x[0]), to_float(x[2]), Float16{});
      pairs[1] = pack(to_float(x[1]), to_float(x[3]), Float16{});
    }
  }
  // Head dimension of column 2 quad_lane + i of output tile n.
  DEVICE static constexpr int output_column(int n, int quad_lane, int i) {
    return kIsFloat8 ? n / 2 * 16 + 4 * quad_lane + 2 * i + n % 2 : n * 8 + 2 * quad_lane + i;
  }

 private:
  // Four e4m3 to two pairs of fp16, bytes 0 and 2 and bytes 1 and 3, divided by kExpanded: e4m3's bits moved into place
  // are the same number with fp16's larger exponent bias. Exact, subnormals included; NaN (never stored) becomes 480.
  DEVICE static void expand(uint32_t x, uint32_t& even, uint32_t& odd) {
    even = (x << 8 & 0x80008000u) | (x << 7 & 0x3f803f80u);
    odd = (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
  }

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
