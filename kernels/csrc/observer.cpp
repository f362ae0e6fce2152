#include "observer.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "thread_pool.h"

namespace pagestream {
namespace {

struct ObserverScratch {};

constexpr int64_t kStats = 5;
constexpr float kLeastRest = 1e-3f;  // below it nothing can be said of what is not on position 0
constexpr int64_t kVector = 16;      // floats of the widest instruction set

int32_t context_of(const AttentionParams& p, const ObservedRow& row) {
  return p.context_lengths[row.sequence] - p.query_starts[row.sequence + 1] + row.row + 1;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Behind the logarithms of 1 to at least `count`, falling; what follows may be read.
const float* log2_ends(int64_t count) {
  thread_local std::vector<float> falling(kVector);
  int64_t size = static_cast<int64_t>(falling.size()) - kVector;
  if (size < count) {
    size = std::max(count, 2 * size);
    falling.assign(size + kVector, 0);
    for (int64_t i = 0; i < size; ++i) falling[i] = std::log2(static_cast<float>(size - i));
  }
  return falling.data() + size;
}

}  // namespace

void check_observation(const Observation& o, const AttentionParams& p) {
  for (int64_t i = 0; i < o.num_rows; ++i) {
    const ObservedRow& row = o.rows[i];
    const bool has_sequence = row.sequence >= 0 && row.sequence < p.num_sequences;
    if (!has_sequence || row.row < p.query_starts[row.sequence] || row.row >= p.query_starts[row.sequence + 1])
      throw std::invalid_argument("observed: entry " + std::to_string(i) + " names row " + std::to_string(row.row) +
                                  " of sequence " + std::to_string(row.sequence) + ", which has no such row");
    if (i > 0 && row.row <= o.rows[i - 1].row) throw std::invalid_argument("observed: rows must increase");
    if (row.pages >= o.num_page_rows)
      throw std::invalid_argument("observed: entry " + std::to_string(i) + " has pages " + std::to_string(row.pages) +
                                  " of " + std::to_string(o.num_page_rows));
  }
  for (int64_t i = 0; i < o.num_spans; ++i) {
    const ObservedSpan& span = o.spans[i];
    if (span.observed < (i == 0 ? 0 : o.spans[i - 1].observed) || span.observed >= o.num_rows)
      throw std::invalid_argument("spans must name observed rows in their order; entry " + std::to_string(i) + " is " +
                                  std::to_string(span.observed) + " of " + std::to_string(o.num_rows));
    if (span.begin < 0 || span.begin >= span.end || span.end > context_of(p, o.rows[span.observed]))
      throw std::invalid_argument("spans: entry " + std::to_string(i) + ", " + std::to_string(span.begin) + " to " +
                                  std::to_string(span.end) + ", is not inside its row's context");
  }
}

Observer::Observer(const Observation& observation, const AttentionParams& p, int64_t num_layers)
    : o_(observation), num_layers_(num_layers), first_span_(observation.num_rows + 1) {
  int64_t longest = 0;
  for (int64_t i = 0; i < o_.num_rows; ++i)  // not the row's own context: attention keeps whole tiles, of later rows too
    longest = std::max<int64_t>(longest, p.context_lengths[o_.rows[i].sequence]);
  log2_ends_ = log2_ends(longest);
  weight_stride_ = round_up(longest, kTile);
  const int64_t heads = o_.num_rows * p.num_heads;
  const int64_t record_floats = sizeof(HeadRecord) / sizeof(float);
  const int64_t floats[] = {heads * weight_stride_, heads * weight_stride_ / kTile, heads * kStats,
                            heads * record_floats, int64_t{p.num_tokens}};
  int64_t total = 0;
  for (int64_t count : floats) total += round_up(count, kVector);
  float* next = reinterpret_cast<float*>(thread_buffer<ObserverScratch>(total * int64_t{sizeof(float)}));
  float* starts[std::size(floats)];
  for (size_t i = 0; i < std::size(floats); next += round_up(floats[i++], kVector)) starts[i] = next;
  weights_ = starts[0];
  weight_shifts_ = starts[1];
  stats_ = starts[2];
  records_ = reinterpret_cast<HeadRecord*>(starts[3]);
  observed_ = reinterpret_cast<int32_t*>(starts[4]);
  std::fill_n(observed_, p.num_tokens, -1);
  for (int64_t i = 0; i < o_.num_rows; ++i) observed_[o_.rows[i].row] = static_cast<int32_t>(i);
  for (int64_t i = 0; i < o_.num_spans; ++i) ++first_span_[o_.spans[i].observed + 1];
  for (int64_t i = 0; i < o_.num_rows; ++i) first_span_[i + 1] += first_span_[i];
  for (int64_t i = 0; i < o_.num_rows * o_.num_groups; ++i) {
    o_.means[i] = {};
    o_.means[i].entropy_min = std::numeric_limits<float>::infinity();
  }
}

void Observer::keep(AttentionParams& p) const {
  p.observed = observed_;
  p.stats = stats_;
  p.weights = weights_;
  p.weight_shifts = weight_shifts_;
  p.weight_stride = weight_stride_;
}

void Observer::observe(const AttentionKernel& kernel, const AttentionParams& p, int64_t layer, int64_t threads) const {
  const int64_t weights_at_once = o_.num_spans == 0 ? 1 << 14 : 1 << 10;  // some microseconds: spans read values, too
  const int64_t heads = p.num_heads;
  parallel_for(o_.num_rows * heads, weights_at_once / weight_stride_ + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit / heads, head = unit % heads;
      const ObservedRow& row = o_.rows[i];
      const int64_t span = first_span_[i], page_width = p.max_pages + 1;
      ObservedHead observed = {};
      observed.row = row;
      observed.observed = static_cast<int32_t>(i);
      observed.head = static_cast<int32_t>(head);
      observed.context = context_of(p, row);
      observed.log2_counts = log2_ends_ - observed.context;
      observed.record = records_ + unit;
      if (row.pages >= 0)
        observed.page_masses = o_.page_masses + ((row.pages * num_layers_ + layer) * heads + head) * page_width;
      observed.spans = o_.spans + span;
      observed.num_spans = static_cast<int32_t>(first_span_[i + 1] - span);
      observed.span_shares = o_.span_shares + ((span * num_layers_ + layer) * heads + head) * 2;
      observed.span_stride = num_layers_ * heads * 2;
      kernel.observe(p, observed);
    }
  });
  for (int64_t i = 0; i < o_.num_rows; ++i) {
    GroupMeans* const means = o_.means + i * o_.num_groups;
    for (int64_t head = 0; head < heads; ++head)
      add(records_[i * heads + head], means[layer * o_.num_groups / num_layers_]);
    for (int64_t g = 0; layer == num_layers_ - 1 && g < o_.num_groups; ++g) divide(means[g]);
  }
}

void Observer::add(const HeadRecord& r, GroupMeans& sums) const {
  sums.heads += 1;
  sums.entropy += r.entropy;
  sums.entropy_min = std::min(sums.entropy_min, r.entropy);
  sums.entropy_max = std::max(sums.entropy_max, r.entropy);
  sums.sink += r.sink;
  sums.recent += r.recent;
  sums.p_max += r.p_max;
  for (int b = 0; b < kBands; ++b) sums.bands[b] += r.bands[b];
  const float rest = 1 - r.first;
  if (rest <= kLeastRest) return;
  // Chain rule: H = h(p_0) + (1 - p_0) H_rest, h the entropy of two outcomes.
  const float first = r.first > 0 ? -r.first * std::log(r.first) : 0;
  sums.rest_heads += 1;
  sums.entropy_rest += std::max(0.0f, (r.entropy - first + rest * std::log(rest)) / rest);
  sums.log2_distance += r.log2_distance / rest;
}

void Observer::divide(GroupMeans& sums) const {
  for (float* sum : {&sums.entropy, &sums.sink, &sums.recent, &sums.p_max}) *sum /= sums.heads;
  for (float& sum : sums.bands) sum /= sums.heads;
  for (float* sum : {&sums.entropy_rest, &sums.log2_distance}) *sum /= std::max(1.0f, sums.rest_heads);
}

}  // namespace pagestream
