// The operators on plain parameters: each cuts its work and hands it to the threads.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "decoder_params.h"
#include "linear_params.h"
#include "plan.h"

namespace pagestream {

// What serves the instruction set that was chosen.
struct Kernels {
  const AttentionKernel* attention;
  const LinearKernel* linear;
  const RowKernel* rows;
};

void attend(const AttentionKernel& kernel, const AttentionParams& p, const Plan& plan, int64_t threads);

// Bytes of `rows` rows of `groups` groups once quantised, `prefill_rows` of them in bfloat16; where in `memory` they go.
int64_t quantized_bytes(int64_t rows, int64_t prefill_rows, int64_t groups);
void place_quantized(LinearParams& p, char* memory);

// The outputs of up to kMaxParts matrices, one beside the other, of rows that were quantised for the first of them.
void multiply(const LinearKernel& kernel, const LinearParams* parts, int num_parts, int64_t threads);

// All layers of a network. Contents of tensors are checked first: std::invalid_argument, and nothing was written.
void decode(const Kernels& kernels, const DecoderModel& model, const DecoderStep& step, int64_t threads);

// A buffer of the calling thread that only grows, aligned to 64 bytes: no allocation once warm. A large one asks for huge
// pages: the rows of a step lie pages apart, and a product that writes to 32 of them would wait for their addresses.
template <typename Purpose>
char* thread_buffer(int64_t bytes) {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  constexpr int64_t kLine = 64, kHugePage = int64_t{2} << 20;
  thread_local std::unique_ptr<char, Free> buffer;
  thread_local int64_t size = 0;
  if (size < bytes || !buffer) {
    const int64_t unit = bytes < kHugePage ? kLine : kHugePage;
    size = (std::max(bytes, kLine) + unit - 1) / unit * unit;
    buffer.reset();
    buffer.reset(static_cast<char*>(std::aligned_alloc(unit, size)));
    if (!buffer) throw std::bad_alloc();
    if (unit == kHugePage) madvise(buffer.get(), size, MADV_HUGEPAGE);
  }
  return buffer.get();
}

}  // namespace pagestream
