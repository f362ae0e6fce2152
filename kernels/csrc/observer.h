// The attention of chosen rows over all layers of a step: kept by the kernel, reduced over heads after each layer.
#pragma once

#include "operators.h"

namespace pagestream {

// std::invalid_argument where rows, spans or pages point outside.
void check_observation(const Observation& o, const AttentionParams& p);

class Observer {
 public:
  // `p` has the step's sequences, heads and pages.
  Observer(const Observation& observation, const AttentionParams& p, int64_t num_layers);

  // Makes attention keep the weights of the rows.
  void keep(AttentionParams& p) const;

  // Adds what attention with these parameters kept: of the layers in order.
  void observe(const AttentionKernel& kernel, const AttentionParams& p, int64_t layer, int64_t threads) const;

 private:
  void add(const HeadRecord& record, GroupMeans& sums) const;
  void divide(GroupMeans& sums) const;

  const Observation& o_;
  const int64_t num_layers_;
  int64_t weight_stride_;
  const float* log2_ends_;           // [-i] = log2(i)
  std::vector<int32_t> first_span_;  // [O + 1]
  int32_t* observed_;
  float *weights_, *weight_shifts_, *stats_;
  HeadRecord* records_;
};

}  // namespace pagestream
