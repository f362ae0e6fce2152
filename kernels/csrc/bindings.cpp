// The operators on CPU tensors. With torch_params.h and bindings_cuda.cpp all that knows torch, through its stable ABI:
// one library serves every torch >= TORCH_TARGET_VERSION. Shapes and types were checked by the Python functions; what
// only the contents of tensors tell is checked in plan.h.
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "amx.h"
#include "append.h"
#include "operators.h"
#include "thread_pool.h"
#include "torch_params.h"

extern "C" {
extern const pagestream::AttentionKernel pagestream_attention_baseline;
extern const pagestream::LinearKernel pagestream_linear_baseline;
extern const pagestream::RowKernel pagestream_rows_baseline;
#if defined(__x86_64__)
extern const pagestream::AttentionKernel pagestream_attention_avx2, pagestream_attention_avx512, pagestream_attention_amx;
extern const pagestream::LinearKernel pagestream_linear_avx2, pagestream_linear_vnni, pagestream_linear_amx;
extern const pagestream::RowKernel pagestream_rows_avx2, pagestream_rows_avx512;
#endif
}

namespace {

using pagestream::AttentionParams;
using pagestream::DType;
using pagestream::Kernels;
using pagestream::LinearParams;
using pagestream::parallel_for;

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

// What runs on `isa`: for each operator the best build it allows. None where this machine does not have it.
std::optional<Kernels> kernels_named(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx" && has_amx())
    return Kernels{&pagestream_attention_amx, &pagestream_linear_amx, &pagestream_rows_avx512};
  if (isa == "vnni" && has_vnni())
    return Kernels{&pagestream_attention_avx512, &pagestream_linear_vnni, &pagestream_rows_avx512};
  if (isa == "avx512" && has_avx512())
    return Kernels{&pagestream_attention_avx512, &pagestream_linear_avx2, &pagestream_rows_avx512};
  if (isa == "avx2" && has_avx2())
    return Kernels{&pagestream_attention_avx2, &pagestream_linear_avx2, &pagestream_rows_avx2};
#endif
  if (isa == "baseline")
    return Kernels{&pagestream_attention_baseline, &pagestream_linear_baseline, &pagestream_rows_baseline};
  return std::nullopt;
}

Kernels selected = {};  // build.py selects right after loading

void paged_attention(const Tensor query, const Tensor key_cache, const Tensor value_cache, const Tensor block_tables,
                     const Tensor query_starts, const Tensor context_lengths, double scale, int64_t window,
                     const Tensor out, const std::optional<Tensor> stats, const std::optional<Tensor> page_masses,
                     const std::optional<Tensor> /*workspace*/, const std::optional<Tensor> key_scales,
                     const std::optional<Tensor> value_scales) {
  AttentionParams p = make_params(query, key_cache, value_cache, block_tables, query_starts, context_lengths, scale,
                                  window, out, stats, page_masses);
  if (p.cache_dtype == pagestream::DType::kInt8) {
    p.key_scales = static_cast<const float*>(key_scales->data_ptr());
    p.value_scales = static_cast<const float*>(value_scales->data_ptr());
    p.key_scale_page_stride = key_scales->stride(0);
    p.key_scale_head_stride = key_scales->stride(1);
    p.value_scale_page_stride = value_scales->stride(0);
    p.value_scale_head_stride = value_scales->stride(1);
  }
  const int64_t threads = torch::stable::get_num_threads();
  attend(*selected.attention, p, make_plan(p, threads, selected.attention->partial_floats(p)), threads);
}

constexpr int64_t kTokensAtOnce = 64;

StoreParams store_params(const void* rows, int64_t token_stride, int64_t head_stride, const Tensor& cache,
                         const Tensor& slots, const std::optional<Tensor>& scales) {
  const int64_t tokens = slots.size(0), capacity = cache.size(0) * cache.size(2);
  const StoreParams p{rows,
                      cache.data_ptr(),
                      static_cast<const int64_t*>(slots.data_ptr()),
                      token_stride,
                      head_stride,
                      cache.stride(0),
                      cache.stride(1),
                      static_cast<int32_t>(cache.size(1)),
                      static_cast<int32_t>(cache.size(3)),
                      static_cast<int32_t>(cache.size(2)),
                      scales ? static_cast<float*>(scales->data_ptr()) : nullptr,
                      scales ? scales->stride(0) : 0,
                      scales ? scales->stride(1) : 0};
  for (int64_t i = 0; i < tokens; ++i)
    if (p.slots[i] < 0 || p.slots[i] >= capacity)
      throw std::invalid_argument("store_kv: slot " + std::to_string(p.slots[i]) + " of token " + std::to_string(i) +
                                  " is outside the cache of " + std::to_string(capacity) + " slots");
  return p;
}

void store_one(const Tensor& rows, const Tensor& cache, const Tensor& slots, const std::optional<Tensor>& scales) {
  const StoreParams p = store_params(rows.data_ptr(), rows.stride(0), rows.stride(1), cache, slots, scales);
  const StoreToken store = store_token_for(dtype_of(rows), dtype_of(cache));
  parallel_for(slots.size(0), kTokensAtOnce, torch::stable::get_num_threads(), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) store(p, token);
  });
}

void store_kv(const Tensor key, const Tensor value, const Tensor key_cache, const Tensor value_cache,
              const Tensor slots, const std::optional<Tensor> key_scales, const std::optional<Tensor> value_scales) {
  store_one(key, key_cache, slots, key_scales);
  store_one(value, value_cache, slots, value_scales);
}

void append_kv(const Tensor heads, const Tensor cos, const Tensor signed_sin, const std::optional<Tensor> norm_weight,
               double epsilon, const Tensor key_cache, const Tensor value_cache, const Tensor slots,
               const std::optional<Tensor> key_scales, const std::optional<Tensor> value_scales) {
  AppendParams p{heads.data_ptr(),
                 static_cast<const float*>(cos.data_ptr()),
                 static_cast<const float*>(signed_sin.data_ptr()),
                 norm_weight ? norm_weight->data_ptr() : nullptr,
                 static_cast<float>(epsilon),
                 heads.stride(0),
                 heads.stride(1),
                 static_cast<int32_t>(heads.size(1) - 2 * key_cache.size(1)),
                 static_cast<int32_t>(key_cache.size(1)),
                 static_cast<int32_t>(heads.size(2))};
  const DType from = dtype_of(heads), to = dtype_of(key_cache);
  const int64_t first_value = (p.num_heads + p.num_kv_heads) * p.head_stride * static_cast<int64_t>(heads.element_size());
  const StoreParams keys = store_params(nullptr, 0, p.head_size, key_cache, slots, key_scales);
  const StoreParams values = store_params(static_cast<const char*>(p.heads) + first_value, p.token_stride,
                                          p.head_stride, value_cache, slots, value_scales);
  const RotateToken rotate = rotate_token_for(from);
  const StoreToken store_key = store_token_for(DType::kFloat32, to), store_value = store_token_for(from, to);
  parallel_for(slots.size(0), kTokensAtOnce, torch::stable::get_num_threads(), [&](int64_t begin, int64_t end) {
    std::vector<float> rotated(static_cast<size_t>(p.num_kv_heads + 2) * p.head_size);
    StoreParams mine = keys;
    mine.rows = rotated.data();
    for (int64_t token = begin; token < end; ++token) {
      rotate(p, token, rotated.data(), rotated.data() + int64_t{p.num_kv_heads} * p.head_size);
      store_key(mine, token);
      store_value(values, token);
    }
  });
}

pagestream::PackedWeight packed_weight(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& mins) {
  return {static_cast<const uint8_t*>(codes.data_ptr()), static_cast<const uint16_t*>(scales.data_ptr()),
          mins ? static_cast<const uint16_t*>(mins->data_ptr()) : nullptr, codes.size(1)};
}

LinearParams make_params(const Tensor& input, const Tensor& codes, const Tensor& scales,
                         const std::optional<Tensor>& mins, const Tensor& out, int64_t prefill_rows) {
  LinearParams p;
  p.input = input.data_ptr();
  p.out = out.data_ptr();
  p.weight = packed_weight(codes, scales, mins);
  p.input_stride = input.stride(0);
  p.out_stride = out.stride(0);
  p.rows = input.size(0);
  p.prefill_rows = selected.linear->has_prefill ? prefill_rows : 0;
  p.outputs = out.size(1);
  p.dtype = dtype_of(input);
  return p;
}

struct LinearScratch {};

void quantized_linear(const Tensor input, const Tensor codes, const Tensor scales, const std::optional<Tensor> mins,
                      const Tensor out, int64_t prefill_rows) {
  LinearParams p = make_params(input, codes, scales, mins, out, prefill_rows);
  const int64_t threads = torch::stable::get_num_threads(), groups = p.weight.groups;
  const int64_t bytes = pagestream::quantized_bytes(p.rows, p.prefill_rows, groups);
  place_quantized(p, pagestream::thread_buffer<LinearScratch>(bytes));
  constexpr int64_t kGroupsAtOnce = 256;  // some microseconds: less is not worth sharing
  parallel_for(p.rows, kGroupsAtOnce / groups + 1, threads,
               [&](int64_t begin, int64_t end) { selected.linear->quantize(p, begin, end); });
  multiply(*selected.linear, &p, 1, threads);
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

// Page sizes are those of checks.py.
void check_caches(const pagestream::DecoderModel& m, const Tensor& caches, const std::optional<Tensor>& scales) {
  const ScalarType type = caches.scalar_type();
  bool fits = (type == ScalarType::Char) == scales.has_value() && caches.dim() == 6;
  fits = fits && (scales || type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half);
  fits = fits && caches.size(0) == m.num_layers && caches.size(2) == m.num_kv_heads && caches.size(3) == 2;
  fits = fits && caches.size(5) == m.head_size && caches.stride(4) == m.head_size && caches.stride(5) == 1;
  const int64_t page_size = fits ? caches.size(4) : 0;
  if (page_size < 16 || page_size > 128 || (page_size & (page_size - 1)) != 0)
    throw std::invalid_argument("caches have another dtype, layout, shape or page size than the network's");
  if (!scales) return;
  fits = scales->scalar_type() == ScalarType::Float && scales->dim() == 5 && scales->stride(4) == 1;
  for (int64_t dim = 0; dim < 5; ++dim) fits = fits && scales->size(dim) == caches.size(dim);
  if (!fits) throw std::invalid_argument("scales of caches have another dtype, layout or shape than those");
}

void decode(const Tensor model, double epsilon, double magnitude, const Tensor token_ids, const Tensor positions,
            const Tensor slots, const Tensor query_starts, const Tensor context_lengths, const Tensor block_tables,
            const Tensor sampled_rows, int64_t prefill_rows, const Tensor caches, const std::optional<Tensor> scales,
            const Tensor logits, const Tensor summary, const std::optional<Tensor> with_statistics,
            const Tensor seconds, const std::optional<Tensor> observed, const std::optional<Tensor> spans,
            const std::optional<Tensor> means, const std::optional<Tensor> page_masses,
            const std::optional<Tensor> span_shares) {
  const auto& m = *reinterpret_cast<const pagestream::DecoderModel*>(model.data_ptr());
  const int64_t rows = token_ids.size(0), sequences = context_lengths.size(0), layers = m.num_layers;
  check("token_ids", token_ids, ScalarType::Long, {rows});
  check("positions", positions, ScalarType::Long, {rows});
  check("slots", slots, ScalarType::Long, {rows});
  check("query_starts", query_starts, ScalarType::Int, {sequences + 1});
  check("context_lengths", context_lengths, ScalarType::Int, {sequences});
  check("block_tables", block_tables, ScalarType::Int, {sequences, block_tables.size(1)});
  check("sampled_rows", sampled_rows, ScalarType::Long, {sampled_rows.size(0)});
  if (with_statistics) check("with_statistics", *with_statistics, ScalarType::Bool, {sampled_rows.size(0)});
  check_caches(m, caches, scales);
  const int64_t element = caches.element_size();
  pagestream::DecoderStep s = {};
  s.token_ids = data_of<int64_t>(token_ids);
  s.positions = data_of<int64_t>(positions);
  s.slots = data_of<int64_t>(slots);
  s.prefill_rows = prefill_rows;
  s.sampled_rows = data_of<int64_t>(sampled_rows);
  s.num_sampled = sampled_rows.size(0);
  s.logits = static_cast<float*>(logits.data_ptr());
  s.summary = static_cast<pagestream::OutputSummary*>(summary.data_ptr());
  s.with_statistics = with_statistics ? data_of<bool>(*with_statistics) : nullptr;
  s.seconds = static_cast<double*>(seconds.data_ptr());
  s.epsilon = static_cast<float>(epsilon);
  s.magnitude = static_cast<float>(magnitude);
  s.cache_layer_bytes = caches.stride(0) * element;
  AttentionParams& p = s.attention;
  p.key_cache = caches.data_ptr();
  p.value_cache = data_of<char>(caches) + caches.stride(3) * element;
  p.key_page_stride = p.value_page_stride = caches.stride(1);
  p.key_head_stride = p.value_head_stride = caches.stride(2);
  if (scales) {
    s.scale_layer_stride = scales->stride(0);
    p.key_scales = data_of<float>(*scales);
    p.value_scales = p.key_scales + scales->stride(3);
    p.key_scale_page_stride = p.value_scale_page_stride = scales->stride(1);
    p.key_scale_head_stride = p.value_scale_head_stride = scales->stride(2);
  }
  p.num_pages = static_cast<int32_t>(caches.size(1));
  p.page_size = static_cast<int32_t>(caches.size(4));
  p.cache_dtype = dtype_of(caches);
  p.query_dtype = pagestream::DType::kFloat32;
  p.block_tables = data_of<int32_t>(block_tables);
  p.block_table_stride = block_tables.stride(0);
  p.max_pages = static_cast<int32_t>(block_tables.size(1));
  p.query_starts = data_of<int32_t>(query_starts);
  p.context_lengths = data_of<int32_t>(context_lengths);
  p.num_sequences = static_cast<int32_t>(context_lengths.size(0));
  p.num_tokens = static_cast<int32_t>(token_ids.size(0));
  p.num_heads = static_cast<int32_t>(m.num_heads);
  p.num_kv_heads = static_cast<int32_t>(m.num_kv_heads);
  p.head_size = static_cast<int32_t>(m.head_size);
  p.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(m.head_size)));
  pagestream::Observation observation = {};
  if (observed) {
    observation.rows = data_of<pagestream::ObservedRow>(*observed);
    observation.spans = data_of<pagestream::ObservedSpan>(*spans);
    observation.num_rows = observed->size(0);
    observation.num_spans = spans->size(0);
    observation.num_groups = means->size(1);
    observation.num_page_rows = page_masses->size(0);
    observation.means = static_cast<pagestream::GroupMeans*>(means->data_ptr());
    observation.page_masses = static_cast<float*>(page_masses->data_ptr());
    observation.span_shares = static_cast<float*>(span_shares->data_ptr());
    s.observation = &observation;
  }
  pagestream::decode(selected, m, s, torch::stable::get_num_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pagestream, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("store_kv", TORCH_BOX(&store_kv));
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("decode", TORCH_BOX(&decode));
}

// 0 when this machine cannot run `isa` (a name of build.py) or the library does not hold it. Not while an operator runs.
extern "C" __attribute__((visibility("default"))) int pagestream_select_isa(const char* isa) {
  const std::optional<Kernels> kernels = kernels_named(isa);
  if (!kernels) return 0;
  selected = *kernels;
  return 1;
}
