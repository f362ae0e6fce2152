// The append kernels' entry points.
#include "append.h"

#include "launch.h"

namespace pagestream::gpu {
namespace {

template <typename T, typename Cache>
__global__ void __launch_bounds__(kAppendThreads) append_kernel(const __grid_constant__ AppendParams p) {
  AppendWarp<T, Cache>(p).run();
}

template <typename T, typename Cache>
cudaError_t launch(const AppendParams& p, cudaStream_t stream) {
  const int64_t warps = int64_t{p.num_tokens} * (p.num_heads + 2 * p.num_kv_heads);
  const int64_t blocks = (warps * kWarpSize + kAppendThreads - 1) / kAppendThreads;
  append_kernel<T, Cache><<<static_cast<unsigned>(blocks), kAppendThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const AppendParams& p, cudaStream_t stream) {
  return p.cache_dtype == DType::kFloat8 ? launch<T, Float8>(p, stream) : launch<T, T>(p, stream);
}

}  // namespace

const char* run_append(const AppendParams& p, void* stream) {
  if (p.num_tokens == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = p.dtype == DType::kFloat16 ? launch<Float16>(p, on) : launch<BFloat16>(p, on);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pagestream::gpu
