// The operators on CUDA tensors. Compiled by the C++ compiler, without any header or library of CUDA torch: the one
// symbol that only CUDA builds of torch have, the current stream, is looked up at run time.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "torch_params.h"
#include "torch_stream.h"

namespace {

using pagestream::gpu::AttentionLauncher;
using pagestream::gpu::GpuParams;
using pagestream::gpu::Workspace;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kCopyBytes = 16;

void check(const char* error, const char* what) { STD_TORCH_CHECK(error == nullptr, what, ": ", error); }

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(get_current_stream(device, &stream), "this torch has no CUDA stream to offer");
  return stream;
}

const AttentionLauncher* launcher_for(int64_t head_size) {
  switch (head_size) {
    case 64: return &pagestream_gpu_attention_64;
    case 80: return &pagestream_gpu_attention_80;
    case 96: return &pagestream_gpu_attention_96;
    case 128: return &pagestream_gpu_attention_128;
    default: return nullptr;
  }
}

void check_dtypes(const char* what, const Tensor& rows, const Tensor& cache) {
  const ScalarType from = rows.scalar_type(), to = cache.scalar_type();
  STD_TORCH_CHECK(from != ScalarType::Float && (to == from || to == ScalarType::Float8_e4m3fn), what,
                  ": the CUDA kernel takes bfloat16 and float16, with caches of the same or float8_e4m3fn");
}

const float* floats_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

// Copies and matrix loads move 16 bytes at a time, query and output 4.
void check_alignment(const char* name, const Tensor& tensor, int64_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0;
  for (int64_t dim = 0; dim < tensor.dim() - 1; ++dim)
    aligned &= tensor.stride(dim) * static_cast<int64_t>(tensor.element_size()) % bytes == 0;
  STD_TORCH_CHECK(aligned, "paged_attention: ", name, " must be aligned to ", bytes, " bytes in every dimension");
}

// Floats that `page_masses` needs besides itself: a page of one slice needs none.
int64_t slices_of(const std::optional<Tensor>& page_masses, int64_t page_size) {
  const int64_t slices = page_size / pagestream::gpu::kSliceKeys;
  return page_masses && slices > 1 ? page_masses->numel() * slices : 0;
}

int32_t count_blocks(const AttentionLauncher& launcher, int32_t device) {
  int blocks = 0;
  check(launcher.count_blocks(device, &blocks), "attention_workspace");
  return blocks;
}

int64_t attention_workspace_size(const Tensor query, const std::optional<Tensor> page_masses, int64_t page_size) {
  const AttentionLauncher* launcher = launcher_for(query.size(2));
  if (launcher == nullptr) return 0;
  const int32_t device = query.get_device_index();
  const DeviceGuard guard(device);
  return Workspace::floats(count_blocks(*launcher, device), query.size(2)) + slices_of(page_masses, page_size);
}

Workspace layout_of(const Tensor& workspace, const AttentionLauncher& launcher, int64_t head_size, int64_t slices) {
  const int32_t blocks = count_blocks(launcher, workspace.get_device_index());
  const int64_t needed = Workspace::floats(blocks, head_size) + slices;
  STD_TORCH_CHECK(workspace.numel() >= needed, "workspace has ", workspace.numel(), " floats, this needs ", needed,
                  ": make it by attention_workspace, with the page masses");
  return Workspace(static_cast<float*>(workspace.data_ptr()), blocks, head_size);
}

void plan_attention(const Tensor query_starts, const Tensor context_lengths, int64_t num_heads, int64_t num_kv_heads,
                    int64_t head_size, int64_t window, const Tensor workspace) {
  const AttentionLauncher* launcher = launcher_for(head_size);
  if (launcher == nullptr) return;  // the reference serves it
  const int32_t device = workspace.get_device_index();
  const DeviceGuard guard(device);
  GpuParams p{};
  p.query_starts = static_cast<const int32_t*>(query_starts.data_ptr());
  p.context_lengths = static_cast<const int32_t*>(context_lengths.data_ptr());
  p.num_sequences = static_cast<int32_t>(context_lengths.size(0));
  p.num_heads = static_cast<int32_t>(num_heads);
  p.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  p.window = static_cast<int32_t>(window);
  p.workspace = layout_of(workspace, *launcher, head_size, 0);
  check(pagestream::gpu::run_plan(p, current_stream(device)), "plan_attention");
}

// For a call without a workspace: the one place that allocates.
Tensor planned_workspace(const Tensor& query, const Tensor& key_cache, const Tensor& query_starts,
                         const Tensor& context_lengths, int64_t window, const std::optional<Tensor>& page_masses) {
  const int64_t size = attention_workspace_size(query, page_masses, key_cache.size(2));
  const Tensor workspace = torch::stable::new_empty(query, {size}, ScalarType::Float);
  plan_attention(query_starts, context_lengths, query.size(1), key_cache.size(1), query.size(2), window, workspace);
  return workspace;
}

void paged_attention(const Tensor query, const Tensor key_cache, const Tensor value_cache, const Tensor block_tables,
                     const Tensor query_starts, const Tensor context_lengths, double scale, int64_t window,
                     const Tensor out, const std::optional<Tensor> stats, const std::optional<Tensor> page_masses,
                     const std::optional<Tensor> given_workspace, const std::optional<Tensor> key_scales,
                     const std::optional<Tensor> value_scales) {
  const AttentionLauncher* launcher = launcher_for(query.size(2));
  STD_TORCH_CHECK(launcher != nullptr, "paged_attention: the CUDA kernel takes head sizes 64, 80, 96, 128");
  check_dtypes("paged_attention", query, key_cache);
  check_alignment("query", query, 4);
  check_alignment("out", out, 4);
  check_alignment("key_cache", key_cache, kCopyBytes);
  check_alignment("value_cache", value_cache, kCopyBytes);
  const int32_t device = query.get_device_index();
  const DeviceGuard guard(device);
  const Tensor workspace =
      given_workspace ? *given_workspace
                      : planned_workspace(query, key_cache, query_starts, context_lengths, window, page_masses);
  GpuParams p{make_params(query, key_cache, value_cache, block_tables, query_starts, context_lengths, scale, window,
                          out, stats, page_masses)};
  const int64_t slices = slices_of(page_masses, p.page_size);
  p.workspace = layout_of(workspace, *launcher, p.head_size, slices);
  p.slice_masses = slices > 0 ? p.workspace.slices : p.page_masses;
  p.page_shift = __builtin_ctz(static_cast<uint32_t>(p.page_size));
  p.key_scales = floats_of(key_scales);
  p.value_scales = floats_of(value_scales);
  check(launcher->run(p, current_stream(device)), "paged_attention");
}

void append_kv(const Tensor heads, const Tensor cos, const Tensor signed_sin, const std::optional<Tensor> norm_weight,
               double epsilon, const Tensor key_cache, const Tensor value_cache, const Tensor slots,
               const std::optional<Tensor> key_scales, const std::optional<Tensor> value_scales) {
  check_dtypes("append_kv", heads, key_cache);
  pagestream::gpu::AppendParams p;
  p.heads = heads.data_ptr();
  p.cos = static_cast<const float*>(cos.data_ptr());
  p.signed_sin = static_cast<const float*>(signed_sin.data_ptr());
  p.norm_weight = norm_weight ? norm_weight->data_ptr() : nullptr;
  p.key_cache = key_cache.data_ptr();
  p.value_cache = value_cache.data_ptr();
  p.slots = static_cast<const int64_t*>(slots.data_ptr());
  p.key_scales = floats_of(key_scales);
  p.value_scales = floats_of(value_scales);
  p.token_stride = heads.stride(0);
  p.head_stride = heads.stride(1);
  p.key_page_stride = key_cache.stride(0);
  p.key_head_stride = key_cache.stride(1);
  p.value_page_stride = value_cache.stride(0);
  p.value_head_stride = value_cache.stride(1);
  p.num_tokens = static_cast<int32_t>(heads.size(0));
  p.num_kv_heads = static_cast<int32_t>(key_cache.size(1));
  p.num_heads = static_cast<int32_t>(heads.size(1)) - 2 * p.num_kv_heads;
  p.head_size = static_cast<int32_t>(heads.size(2));
  p.num_pages = static_cast<int32_t>(key_cache.size(0));
  p.page_size = static_cast<int32_t>(key_cache.size(2));
  p.epsilon = static_cast<float>(epsilon);
  p.dtype = dtype_of(heads);
  p.cache_dtype = dtype_of(key_cache);
  const int32_t device = heads.get_device_index();
  const DeviceGuard guard(device);
  check(pagestream::gpu::run_append(p, current_stream(device)), "append_kv");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pagestream, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("plan_attention", TORCH_BOX(&plan_attention));
  m.impl("attention_workspace_size", TORCH_BOX(&attention_workspace_size));
}
