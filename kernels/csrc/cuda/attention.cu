// The attention kernels of one head size: PAGESTREAM_HEAD_SIZE, which also names the exported table.
#include "attention.h"

#include <atomic>

#include "launch.h"
#include "statistics.h"

namespace pagestream::gpu {
namespace {

constexpr int kHeadSize = PAGESTREAM_HEAD_SIZE;
constexpr int kMaxDevices = 128;  // torch numbers them in 8 bits

template <typename T, typename Cache>
constexpr int kSharedBytes = AttentionBlock<T, Cache, kHeadSize, NoStatistics>::kSharedBytes;

template <typename T, typename Cache, typename Stats>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    attention_kernel(const __grid_constant__ GpuParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  AttentionBlock<T, Cache, kHeadSize, Stats>(p, shared).run();
}

// More than 48 KB must be asked for, and all of it as shared memory: the copies pass L1 by.
template <typename T, typename Cache, typename Stats>
cudaError_t allow_shared_memory() {
  const auto kernel = attention_kernel<T, Cache, Stats>;
  constexpr auto kSize = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, kSize, kSharedBytes<T, Cache>)) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

template <typename T, typename Cache>
cudaError_t allow_shared_memory() {
  const cudaError_t error = allow_shared_memory<T, Cache, NoStatistics>();
  return error == cudaSuccess ? allow_shared_memory<T, Cache, Statistics>() : error;
}

template <typename T>
cudaError_t allow_shared_memory() {
  const cudaError_t error = allow_shared_memory<T, T>();
  return error == cudaSuccess ? allow_shared_memory<T, Float8>() : error;
}

template <typename T, typename Cache, typename Stats>
cudaError_t launch(const GpuParams& p, cudaStream_t stream) {
  attention_kernel<T, Cache, Stats><<<p.workspace.max_blocks, kThreads, kSharedBytes<T, Cache>, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, typename Cache>
cudaError_t launch(const GpuParams& p, cudaStream_t stream) {
  const bool with_statistics = p.stats != nullptr || p.page_masses != nullptr;
  return with_statistics ? launch<T, Cache, Statistics>(p, stream) : launch<T, Cache, NoStatistics>(p, stream);
}

template <typename T>
cudaError_t launch(const GpuParams& p, cudaStream_t stream) {
  return p.cache_dtype == DType::kFloat8 ? launch<T, Float8>(p, stream) : launch<T, T>(p, stream);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

const char* run(const GpuParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return message(p.query_dtype == DType::kFloat16 ? launch<Float16>(p, on) : launch<BFloat16>(p, on));
}

// Of the largest kernel: one plan serves layers with and without statistics, and e4m3 tiles are no larger.
const char* count_blocks(int device, int* blocks) {
  using T = BFloat16;
  static std::atomic<int> known[kMaxDevices];
  if ((*blocks = known[device]) > 0) return nullptr;
  int multiprocessors = 0, resident = 0;
  cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = allow_shared_memory<BFloat16>();
  if (error == cudaSuccess) error = allow_shared_memory<Float16>();
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, attention_kernel<T, T, Statistics>, kThreads,
                                                          kSharedBytes<T, T>);
  if (error == cudaSuccess) known[device] = *blocks = multiprocessors * resident;
  return message(error);
}

}  // namespace
}  // namespace pagestream::gpu

#define PAGESTREAM_TABLE_OF(size) pagestream_gpu_attention_##size
#define PAGESTREAM_TABLE(size) PAGESTREAM_TABLE_OF(size)
extern "C" const pagestream::gpu::AttentionLauncher PAGESTREAM_TABLE(PAGESTREAM_HEAD_SIZE) = {
    pagestream::gpu::count_blocks, pagestream::gpu::run};
