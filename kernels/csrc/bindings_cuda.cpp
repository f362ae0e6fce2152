// The operators on CUDA tensors. Compiled by the C++ compiler, without any header or library of CUDA torch: the one
// symbol that only CUDA builds of torch have, the current stream, is looked up at run time.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "torch_params.h"

namespace {

using pagestream::gpu::AttentionLauncher;
using pagestream::gpu::GpuParams;
using pagestream::gpu::Workspace;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kCopyBytes = 16;

void check(const char* error, const char* what) { STD_TORCH_CHECK(error == nullptr, what, ": ", error); }

void* current_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t device, void** stream);
  static const auto get = reinterpret_cast<GetStream>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  STD_TORCH_CHECK(get != nullptr && get(device, &stream) == 0, "this torch has no CUDA stream to offer");
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

// Copies and matrix loads move 16 bytes at a time, query and output 4.
void check_alignment(const char* name, const Tensor& tensor, int64_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0;
  for (int64_t dim = 0; dim < tensor.dim() - 1; ++dim) aligned &= tensor.stride(dim) * 2 % bytes == 0;
  STD_TORCH_CHECK(aligned, "paged_attention: ", name, " must be aligned to ", bytes, " bytes in every dimension");
}

int32_t blocks_of(const Tensor& workspace, int64_t head_size) {
  const int64_t header = Workspace::floats(0, head_size), block = Workspace::floats(1, head_size) - header;
  const int64_t blocks = (workspace.numel() - header) / block;
  STD_TORCH_CHECK(blocks > 0, "workspace of ", workspace.numel(), " floats: make it by attention_workspace");
  return static_cast<int32_t>(blocks);
}

int64_t attention_workspace_size(const Tensor query) {
  const AttentionLauncher* launcher = launcher_for(query.size(2));
  if (launcher == nullptr) return 0;
  const DeviceGuard guard(query.get_device_index());
  int blocks = 0;
  check(launcher->count_blocks(query.get_device_index(), &blocks), "attention_workspace");
  return Workspace::floats(blocks, query.size(2));
}

void plan_attention(const Tensor query_starts, const Tensor context_lengths, int64_t num_heads, int64_t num_kv_heads,
                    int64_t head_size, int64_t window, const Tensor workspace) {
  if (workspace.numel() == 0) return;  // of a head size that the reference serves
  const int32_t device = workspace.get_device_index();
  const DeviceGuard guard(device);
  GpuParams p{};
  p.query_starts = static_cast<const int32_t*>(query_starts.data_ptr());
  p.context_lengths = static_cast<const int32_t*>(context_lengths.data_ptr());
  p.num_sequences = static_cast<int32_t>(context_lengths.size(0));
  p.num_heads = static_cast<int32_t>(num_heads);
  p.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  p.window = static_cast<int32_t>(window);
  p.workspace = Workspace(static_cast<float*>(workspace.data_ptr()), blocks_of(workspace, head_size));
  check(pagestream::gpu::run_plan(p, current_stream(device)), "plan_attention");
}

Tensor planned_workspace(const Tensor& query, const Tensor& key_cache, const Tensor& query_starts,
                         const Tensor& context_lengths, int64_t window) {
  const Tensor workspace = torch::stable::new_empty(query, {attention_workspace_size(query)}, ScalarType::Float);
  plan_attention(query_starts, context_lengths, query.size(1), key_cache.size(1), query.size(2), window, workspace);
  return workspace;
}

void paged_attention(const Tensor query, const Tensor key_cache, const Tensor value_cache, const Tensor block_tables,
                     const Tensor query_starts, const Tensor context_lengths, double scale, int64_t window,
                     const Tensor out, const std::optional<Tensor> stats, const std::optional<Tensor> page_masses,
                     const std::optional<Tensor> given_workspace) {
  const AttentionLauncher* launcher = launcher_for(query.size(2));
  STD_TORCH_CHECK(launcher != nullptr && query.scalar_type() == key_cache.scalar_type() &&
                      query.scalar_type() != ScalarType::Float,
                  "paged_attention: the CUDA kernel takes head sizes 64, 80, 96, 128 in bfloat16 or float16");
  check_alignment("query", query, 4);
  check_alignment("out", out, 4);
  check_alignment("key_cache", key_cache, kCopyBytes);
  check_alignment("value_cache", value_cache, kCopyBytes);
  const int32_t device = query.get_device_index();
  const DeviceGuard guard(device);
  const Tensor workspace = given_workspace
                               ? *given_workspace
                               : planned_workspace(query, key_cache, query_starts, context_lengths, window);
  GpuParams p{make_params(query, key_cache, value_cache, block_tables, query_starts, context_lengths, scale, window, out,
                          stats, page_masses)};
  p.workspace = Workspace(static_cast<float*>(workspace.data_ptr()), blocks_of(workspace, query.size(2)));
  p.page_shift = __builtin_ctz(static_cast<uint32_t>(p.page_size));
  p.slice_masses = p.page_masses;
  std::optional<Tensor> slices;
  if (page_masses && p.page_size > pagestream::gpu::kSliceKeys) {
    const int64_t slices_per_row = int64_t{p.max_pages} * p.page_size / pagestream::gpu::kSliceKeys;
    slices = torch::stable::new_empty(query, {query.size(0), query.size(1), slices_per_row}, ScalarType::Float);
    p.slice_masses = static_cast<float*>(slices->data_ptr());
  }
  check(launcher->run(p, current_stream(device)), "paged_attention");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pagestream, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("plan_attention", TORCH_BOX(&plan_attention));
  m.impl("attention_workspace_size", TORCH_BOX(&attention_workspace_size));
}
