// The operators on CPU tensors. With torch_params.h and bindings_cuda.cpp all that knows torch, through its stable ABI:
// one library serves every torch >= TORCH_TARGET_VERSION. Shapes and types were checked by the Python functions; what
// only the contents of tensors tell is checked in plan.h.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "amx.h"
#include "linear_params.h"
#include "plan.h"
#include "store_kv.h"
#include "torch_params.h"

extern "C" {
extern const pagestream::AttentionKernel pagestream_attention_baseline;
extern const pagestream::LinearKernel pagestream_linear_baseline;
#if defined(__x86_64__)
extern const pagestream::AttentionKernel pagestream_attention_avx2, pagestream_attention_avx512,
    pagestream_attention_amx;
extern const pagestream::LinearKernel pagestream_linear_avx2, pagestream_linear_vnni;
#endif
}

namespace {

using pagestream::AttentionKernel;
using pagestream::AttentionParams;
using pagestream::LinearKernel;
using pagestream::LinearParams;

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool has_vnni() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool has_amx() {
#if defined(__x86_64__)
  return has_vnni() && __builtin_cpu_supports("avx512bf16") && may_use_amx();
#else
  return false;
#endif
}

struct Kernels {
  const AttentionKernel* attention;
  const LinearKernel* linear;
};

// What runs on `isa`: for each operator the best build it allows. None where this machine does not have it.
std::optional<Kernels> kernels_named(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx" && has_amx()) return Kernels{&pagestream_attention_amx, &pagestream_linear_vnni};
  if (isa == "vnni" && has_vnni()) return Kernels{&pagestream_attention_avx512, &pagestream_linear_vnni};
  if (isa == "avx512" && has_avx512()) return Kernels{&pagestream_attention_avx512, &pagestream_linear_avx2};
  if (isa == "avx2" && has_avx2()) return Kernels{&pagestream_attention_avx2, &pagestream_linear_avx2};
#endif
  if (isa == "baseline") return Kernels{&pagestream_attention_baseline, &pagestream_linear_baseline};
  return std::nullopt;
}

Kernels selected = {};  // build.py selects right after loading

// A buffer of the calling thread that only grows: no allocation once warm.
float* thread_buffer(int64_t floats) {
  constexpr size_t kAlignment = 64 / sizeof(float);
  thread_local std::vector<float> buffer;
  if (buffer.size() < floats + kAlignment) buffer.resize(floats + kAlignment);
  const size_t misaligned = reinterpret_cast<uintptr_t>(buffer.data()) / sizeof(float) % kAlignment;
  return buffer.data() + (kAlignment - misaligned) % kAlignment;
}

void paged_attention(const Tensor query, const Tensor key_cache, const Tensor value_cache, const Tensor block_tables,
                     const Tensor query_starts, const Tensor context_lengths, double scale, int64_t window,
                     const Tensor out, const std::optional<Tensor> stats, const std::optional<Tensor> page_masses,
                     const std::optional<Tensor> /*workspace*/, const std::optional<Tensor> /*key_scales*/,
                     const std::optional<Tensor> /*value_scales*/) {
  const AttentionKernel& kernel = *selected.attention;
  const AttentionParams p = make_params(query, key_cache, value_cache, block_tables, query_starts, context_lengths,
                                        scale, window, out, stats, page_masses);
  const pagestream::Plan plan = pagestream::make_plan(p, torch::stable::get_num_threads(), kernel.partial_floats(p));
  std::vector<float> workspace(plan.workspace_floats);
  torch::stable::parallel_for(0, plan.num_threads(), 1, [&](int64_t begin, int64_t end) {
    float* scratch = thread_buffer(kernel.scratch_floats(p));
    const int64_t first = plan.thread_begin[begin], last = plan.thread_begin[end];
    kernel.run(p, plan.segments.data() + first, last - first, scratch, workspace.data());
  });
  torch::stable::parallel_for(0, static_cast<int64_t>(plan.shared.size()), 4, [&](int64_t begin, int64_t end) {
    float* scratch = thread_buffer(kernel.scratch_floats(p));
    for (int64_t i = begin; i < end; ++i) kernel.finish(p, plan.shared[i], scratch, workspace.data());
  });
}

void store_one(const Tensor& rows, const Tensor& cache, const Tensor& slots) {
  const int64_t tokens = slots.size(0), capacity = cache.size(0) * cache.size(2);
  const StoreParams p{rows.data_ptr(),
                      cache.data_ptr(),
                      static_cast<const int64_t*>(slots.data_ptr()),
                      rows.stride(0),
                      rows.stride(1),
                      cache.stride(0),
                      cache.stride(1),
                      static_cast<int32_t>(cache.size(1)),
                      static_cast<int32_t>(cache.size(3)),
                      static_cast<int32_t>(cache.size(2))};
  for (int64_t i = 0; i < tokens; ++i)
    if (p.slots[i] < 0 || p.slots[i] >= capacity)
      throw std::invalid_argument("store_kv: slot " + std::to_string(p.slots[i]) + " of token " + std::to_string(i) +
                                  " is outside the cache of " + std::to_string(capacity) + " slots");
  const StoreToken store = store_token_for(dtype_of(rows), dtype_of(cache));
  constexpr int64_t kTokensPerThread = 64;
  torch::stable::parallel_for(0, tokens, kTokensPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) store(p, token);
  });
}

void store_kv(const Tensor key, const Tensor value, const Tensor key_cache, const Tensor value_cache,
              const Tensor slots) {
  store_one(key, key_cache, slots);
  store_one(value, value_cache, slots);
}

pagestream::PackedWeight packed_weight(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& mins) {
  return {static_cast<const uint8_t*>(codes.data_ptr()), static_cast<const uint16_t*>(scales.data_ptr()),
          mins ? static_cast<const uint16_t*>(mins->data_ptr()) : nullptr, codes.size(1)};
}

LinearParams make_params(const Tensor& input, const Tensor& codes, const Tensor& scales,
                         const std::optional<Tensor>& mins, const Tensor& out) {
  LinearParams p;
  p.input = input.data_ptr();
  p.out = out.data_ptr();
  p.weight = packed_weight(codes, scales, mins);
  p.input_stride = input.stride(0);
  p.out_stride = out.stride(0);
  p.rows = input.size(0);
  p.outputs = out.size(1);
  p.dtype = dtype_of(input);
  return p;
}

void quantized_linear(const Tensor input, const Tensor codes, const Tensor scales, const std::optional<Tensor> mins,
                      const Tensor out) {
  const LinearKernel& kernel = *selected.linear;
  LinearParams p = make_params(input, codes, scales, mins, out);
  const int64_t groups = p.rows * p.weight.groups;
  thread_local std::vector<float> quantized;  // only grows
  if (quantized.size() < groups * (3 + pagestream::kGroup / sizeof(float)))
    quantized.resize(groups * (3 + pagestream::kGroup / sizeof(float)));
  p.x_scales = quantized.data();
  p.x_offsets = p.x_scales + groups;
  p.x_sums = reinterpret_cast<int32_t*>(p.x_offsets + groups);
  p.x = reinterpret_cast<int8_t*>(p.x_sums + groups);
  constexpr int64_t kGroupsPerThread = 2048, kProductsPerThread = 1 << 17;  // less is not worth waking a thread for
  torch::stable::parallel_for(0, p.rows, kGroupsPerThread / p.weight.groups + 1,
                              [&](int64_t begin, int64_t end) { kernel.quantize(p, begin, end); });
  const int64_t per_block = p.rows * p.weight.groups * pagestream::kGroup * pagestream::kBlockOutputs;
  torch::stable::parallel_for(0, codes.size(0), kProductsPerThread / (per_block + 1) + 1,
                              [&](int64_t begin, int64_t end) { kernel.run(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pagestream, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("store_kv", TORCH_BOX(&store_kv));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

// 0 when this machine cannot run `isa` (a name of build.py) or the library does not hold it. Not while an operator runs.
extern "C" __attribute__((visibility("default"))) int pagestream_select_isa(const char* isa) {
  const std::optional<Kernels> kernels = kernels_named(isa);
  if (!kernels) return 0;
  selected = *kernels;
  return 1;
}
