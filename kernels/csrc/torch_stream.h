// The current CUDA stream of torch, by a symbol that only its CUDA builds have. It is looked up in their library, by name:
// Python loads that one privately, so that it is in nobody's default search order.
#pragma once

#include <dlfcn.h>

#include <cstdint>

namespace {

inline bool get_current_stream(int32_t device, void** stream) {
  using GetStream = int32_t (*)(int32_t device, void** stream);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  return get != nullptr && get(device, stream) == 0;
}

}  // namespace
