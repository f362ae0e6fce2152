// The attention kernels of one head size: PAGESTREAM_HEAD_SIZE, which also names the exported table.
#include "attention.h"

#include "launch.h"
#include "statistics.h"

namespace pagestream::gpu {
namespace {

constexpr int kHeadSize = PAGESTREAM_HEAD_SIZE;

template <typename T, typename Cache>
constexpr int kSharedBytes = AttentionBlock<T, Cache, kHeadSize, NoStatistics>::kSharedBytes;

template <typename T, typename Cache, typename Stats>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    attention_kernel(const __grid_constant__ GpuParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  AttentionBlock<T, Cache, kHeadSize, Stats>(p, shared).run();
}

template <typename T, typename Cache, typename Stats>
cudaError_t allow_shared_memory() {  // more than 48 KB must be asked for, on every device
  constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  return cudaFuncSetAttribute(attention_kernel<T, Cache, Stats>, kAttribute, kSharedBytes<T, Cache>);
}

template <typename T, typename Cache, typename Stats>
cudaError_t launch(const GpuParams& p, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared_memory<T, Cache, Stats>()) return error;
  attention_kernel<T, Cache, Stats><<<p.workspace.max_blocks, kThreads, kSharedBytes<T, Cache>, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, typename Cache>
cudaError_t launch(const GpuParams& p, cudaStream_t stream) {
  const bool with_statistics = p.stats != nullptr || p.page_masses != nullptr;
  return with_statistics ? launch<T, Cache, Statistics>(p, stream) : launch<T, Cache, NoStatistics>(p, stream);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

const char* run(const GpuParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.query_dtype == DType::kFloat16) return message(launch<Float16, Float16>(p, on));
  return message(p.cache_dtype == DType::kFloat8 ? launch<BFloat16, Float8>(p, on) : launch<BFloat16, BFloat16>(p, on));
}

// Of the largest kernel: one plan serves layers with and without statistics, and e4m3 tiles are no larger.
const char* count_blocks(int device, int* blocks) {
  using T = BFloat16;
  int multiprocessors = 0, resident = 0;
  cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = allow_shared_memory<T, T, Statistics>();
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, attention_kernel<T, T, Statistics>, kThreads,
                                                          kSharedBytes<T, T>);
  *blocks = multiprocessors * resident;
  return message(error);
}

}  // namespace
}  // namespace pagestream::gpu

#define PAGESTREAM_TABLE_OF(size) pagestream_gpu_attention_##size
#define PAGESTREAM_TABLE(size) PAGESTREAM_TABLE_OF(size)
extern "C" const pagestream::gpu::AttentionLauncher PAGESTREAM_TABLE(PAGESTREAM_HEAD_SIZE) = {
    pagestream::gpu::count_blocks, pagestream::gpu::run};
