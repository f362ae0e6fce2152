// The online softmax as a value: init, rescale, merge, read out. Base 2 inside (scores carry log2 e), nats outside.
//
// For a set of keys with scores s_j and any shift m: l = sum 2^(s_j - m), u = sum (s_j - m) 2^(s_j - m), and the
// unnormalised output o = sum 2^(s_j - m) v_j. Moving the shift and merging two sets are exact in real arithmetic:
// entropy = ln 2 (log2 l - u / l). u is kept shifted by m because the unshifted form loses digits on large scores.
#pragma once

#include <cmath>

#include "vec.h"

namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kMasked = -1e30f;  // finite: with -inf, an empty set would turn 0 * -inf into NaN

struct Softmax {
  float m = kMasked;
  float l = 0, u = 0, sink = 0, recent = 0;

  // Moves the shift and returns the factor that o takes along.
  float rescale(float new_m) {
    if (new_m == m) return 1;
    const float factor = exp2(m - new_m);
    u = factor * (u + (m - new_m) * l);
    l *= factor;
    sink *= factor;
    recent *= factor;
    m = new_m;
    return factor;
  }

  float log2_sum() const { return m + log2f(l); }

  // stats[5]: log-sum-exp, entropy, largest weight (1 / l: m is the true maximum), sink mass, recent mass.
  void read_out(float* stats) const {
    stats[0] = kLn2 * log2_sum();
    stats[1] = kLn2 * (log2f(l) - u / l);
    stats[2] = 1 / l;
    stats[3] = sink / l;
    stats[4] = recent / l;
  }
};

// total and its output o become those of the union with part; width is a multiple of kLanes.
inline void merge(Softmax& total, float* o, Softmax part, const float* part_o, int width) {
  const float new_m = total.m > part.m ? total.m : part.m;
  const Float a = broadcast(total.rescale(new_m)), b = broadcast(part.rescale(new_m));
  total.l += part.l;
  total.u += part.u;
  total.sink += part.sink;
  total.recent += part.recent;
  for (int d = 0; d < width; d += kLanes) store(o + d, fma(load(part_o + d), b, load(o + d) * a));
}

}  // namespace
