// The attention kernels of one head size: PAGESTREAM_HEAD_SIZE, which also names the exported table.
#include "attention.h"

#include "launch.h"
#include "statistics.h"

namespace pagestream::gpu {
namespace {

constexpr int kHeadSize = PAGESTREAM_HEAD_SIZE;

template <typename T>
constexpr int kSharedBytes = AttentionBlock<T, kHeadSize, NoStatistics>::kSharedBytes;

template <typename T, typename Stats>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    attention_kernel(const __grid_constant__ GpuParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  AttentionBlock<T, kHeadSize, Stats>(p, shared).run();
}

template <typename T, typename Stats>
cudaError_t allow_shared_memory() {  // more than 48 KB must be asked for, on every device
  constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  return cudaFuncSetAttribute(attention_kernel<T, Stats>, kAttribute, kSharedBytes<T>);
}

template <typename T, typename Stats>
cudaError_t launch(const GpuParams& p, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared_memory<T, Stats>()) return error;
  attention_kernel<T, Stats><<<p.workspace.max_blocks, kThreads, kSharedBytes<T>, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const GpuParams& p, cudaStream_t stream) {
  const bool with_statistics = p.stats != nullptr || p.page_masses != nullptr;
  return with_statistics ? launch<T, Statistics>(p, stream) : launch<T, NoStatistics>(p, stream);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

const char* run(const GpuParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return message(p.query_dtype == DType::kBFloat16 ? launch<BFloat16>(p, on) : launch<Float16>(p, on));
}

// Statistics need more registers; one plan serves layers with and without them.
const char* count_blocks(int device, int* blocks) {
  using T = BFloat16;
  int multiprocessors = 0, resident = 0;
  cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = allow_shared_memory<T, Statistics>();
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, attention_kernel<T, Statistics>, kThreads,
                                                          kSharedBytes<T>);
  *blocks = multiprocessors * resident;
  return message(error);
}

}  // namespace
}  // namespace pagestream::gpu

#define PAGESTREAM_TABLE_OF(size) pagestream_gpu_attention_##size
#define PAGESTREAM_TABLE(size) PAGESTREAM_TABLE_OF(size)
extern "C" const pagestream::gpu::AttentionLauncher PAGESTREAM_TABLE(PAGESTREAM_HEAD_SIZE) = {
    pagestream::gpu::count_blocks, pagestream::gpu::run};
