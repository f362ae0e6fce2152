// The operators on plain parameters: each cuts its work and hands it to the threads.
#pragma once

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

// A buffer of the calling thread that only grows, aligned to 64 bytes: no allocation once warm.
template <typename Purpose>
char* thread_buffer(int64_t bytes) {
  thread_local std::vector<char> buffer;
  if (static_cast<int64_t>(buffer.size()) < bytes + 64) buffer = std::vector<char>(bytes + 64);
  return buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64;
}

}  // namespace pagestream
