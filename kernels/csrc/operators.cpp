#include "operators.h"

#include <algorithm>

#include "thread_pool.h"

namespace pagestream {
namespace {

struct AttentionScratch {};
struct AttentionWorkspace {};

}  // namespace

void attend(const AttentionKernel& kernel, const AttentionParams& p, const Plan& plan, int64_t threads) {
  constexpr int64_t kFloat = sizeof(float);
  auto* const workspace = reinterpret_cast<float*>(thread_buffer<AttentionWorkspace>(plan.workspace_floats * kFloat));
  const auto scratch = [&] {
    return reinterpret_cast<float*>(thread_buffer<AttentionScratch>(kernel.scratch_floats(p) * kFloat));
  };
  parallel_for(plan.num_pieces(), 1, threads, [&](int64_t begin, int64_t end) {
    const int64_t first = plan.piece_begin[begin], last = plan.piece_begin[end];
    kernel.run(p, plan.segments.data() + first, last - first, scratch(), workspace);
  });
  parallel_for(static_cast<int64_t>(plan.shared.size()), 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel.finish(p, plan.shared[i], scratch(), workspace);
  });
}

int64_t quantized_bytes(int64_t rows, int64_t prefill_rows, int64_t groups) {
  const int64_t integers = tiled_rows(rows - prefill_rows), floats = integers * (groups + count_spans(groups));
  return (integers + whole_tiles(prefill_rows)) * groups * kGroupBytes + floats * int64_t{sizeof(float)};
}

void place_quantized(LinearParams& p, char* memory) {
  const int64_t integers = tiled_rows(p.rows - p.prefill_rows), groups = p.weight.groups;
  p.x = reinterpret_cast<int8_t*>(memory);
  p.x_sums = reinterpret_cast<float*>(memory + (integers + whole_tiles(p.prefill_rows)) * groups * kGroupBytes);
  p.x_scales = p.x_sums + integers * groups;
}

void multiply(const LinearKernel& kernel, const LinearParams* parts, int num_parts, int64_t threads) {
  constexpr int64_t kProductsAtOnce = 1 << 13;  // half a microsecond: less is not worth handing out
  int64_t first[kMaxParts + 1] = {};            // blocks of the parts, counted through
  for (int i = 0; i < num_parts; ++i)
    first[i + 1] = first[i] + (parts[i].outputs + kBlockOutputs - 1) / kBlockOutputs;
  const int64_t per_block = parts[0].rows * parts[0].weight.groups * kGroup * kBlockOutputs;
  const int64_t pairs_at_once = kProductsAtOnce / (2 * per_block + 1) + 1;  // tiles take two blocks together
  parallel_for(first[num_parts], 2 * pairs_at_once, threads, [&](int64_t begin, int64_t end) {
    for (int i = 0; i < num_parts; ++i) {
      const int64_t from = std::max(begin, first[i]), to = std::min(end, first[i + 1]);
      if (from < to) kernel.run(parts[i], from - first[i], to - first[i]);
    }
  });
}

}  // namespace pagestream
