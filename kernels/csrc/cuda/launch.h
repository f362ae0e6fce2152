// What bindings_cuda.cpp may call of the CUDA sources. Every function returns null, or what went wrong; streams are
// cudaStream_t. Nothing here allocates, synchronises or reads device memory, so that CUDA graphs can capture it.
#pragma once

#include "params.h"

namespace pagestream::gpu {

// One build of attention.cu, for one head size.
struct AttentionLauncher {
  // The blocks that the device holds at once: the grid, and what plans are for. The first call for a device, which must
  // be its current one, also loads the kernels and asks for their shared memory: `run` counts on it.
  const char* (*count_blocks)(int device, int* blocks);
  const char* (*run)(const GpuParams&, void* stream);
};

const char* run_plan(const GpuParams& p, void* stream);
const char* run_append(const AppendParams& p, void* stream);

}  // namespace pagestream::gpu

extern "C" {
extern const pagestream::gpu::AttentionLauncher pagestream_gpu_attention_64;
extern const pagestream::gpu::AttentionLauncher pagestream_gpu_attention_80;
extern const pagestream::gpu::AttentionLauncher pagestream_gpu_attention_96;
extern const pagestream::gpu::AttentionLauncher pagestream_gpu_attention_128;
}
