// Online softmax in base 2 (scores carry log2 e), for the accumulator layout of the tensor cores: a thread has keys
// 2q, 2q + 1, 2q + 8, 2q + 9 of two query rows, q = lane % 4; the four threads of a quad share the rows.
#pragma once

#include "kv_tile.h"

namespace pagestream::gpu {

// Finite: with -inf a row without keys would turn 0 * -inf into NaN. Such a row gets weights 1 at this shift; merging
// with any real score multiplies them by 2^-1e30 = 0.
constexpr float kMasked = -1e30f;
// The shift follows the maximum only when it has grown by this much (FlashAttention 4): weights stay below 2^8, which
// fp16 holds, and most slices rescale nothing.
constexpr float kLazyShift = 8;

template <typename T, typename Combine>
DEVICE T over_quad(T x, Combine combine) {
  x = combine(x, shuffle_xor(x, 1));
  return combine(x, shuffle_xor(x, 2));
}
DEVICE float quad_sum(float x) {
  return over_quad(x, [](float a, float b) { return a + b; });
}
DEVICE float quad_max(float x) {
  return over_quad(x, [](float a, float b) { return larger(a, b); });
}

// The policy for statistics switched off: every use of the real one (statistics.h) stands behind kEnabled.
struct NoStatistics {
  static constexpr bool kEnabled = false;
  struct Merged {};
};

// A query row of a sequence: where it sits and what it attends to.
struct Row {
  int position, first_key;
  int64_t token, head;

  DEVICE Row(const AttentionParams& p, const Sequence& sequence, int kv_head, int row)
      : position(sequence.position(row)),
        first_key(p.window > 0 ? larger(0, position - p.window + 1) : 0),
        token(sequence.first_row + row / sequence.group),
        head(kv_head * sequence.group + row % sequence.group) {}

  DEVICE int64_t index(const AttentionParams& p) const { return token * p.num_heads + head; }
};

}  // namespace pagestream::gpu
