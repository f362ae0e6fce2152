// The plan kernel's entry point.
#include "plan.h"

#include "launch.h"

namespace pagestream::gpu {
namespace {

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ GpuParams p) {
  __shared__ int64_t run_ends[kPlanThreads];
  Planner(p, run_ends).run();
}

}  // namespace

const char* run_plan(const GpuParams& p, void* stream) {
  plan_kernel<<<1, kPlanThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pagestream::gpu
