// Tensors to plain parameters, for both bindings files.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "params.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline pagestream::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return pagestream::DType::kFloat32;
    case ScalarType::Char: return pagestream::DType::kInt8;
    case ScalarType::Float8_e4m3fn: return pagestream::DType::kFloat8;
    case ScalarType::BFloat16: return pagestream::DType::kBFloat16;
    default: return pagestream::DType::kFloat16;
  }
}

// Raises what Python turns into a ValueError.
inline void check(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool fits = tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  int64_t dim = 0;
  for (int64_t size : shape) {
    fits = fits && tensor.size(dim++) == size;
    expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  }
  if (!fits || !tensor.is_contiguous())
    throw std::invalid_argument(std::string(name) + ": its dtype, shape or layout is wrong; the shape must be [" +
                                expected + "]");
}

inline pagestream::AttentionParams make_params(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
    const Tensor& query_starts, const Tensor& context_lengths, double scale, int64_t window, const Tensor& out,
    const std::optional<Tensor>& stats, const std::optional<Tensor>& page_masses) {
  pagestream::AttentionParams p = {};
  p.query = query.data_ptr();
  p.out = out.data_ptr();
  p.key_cache = key_cache.data_ptr();
  p.value_cache = value_cache.data_ptr();
  p.block_tables = static_cast<const int32_t*>(block_tables.data_ptr());
  p.query_starts = static_cast<const int32_t*>(query_starts.data_ptr());
  p.context_lengths = static_cast<const int32_t*>(context_lengths.data_ptr());
  p.stats = stats ? static_cast<float*>(stats->data_ptr()) : nullptr;
  p.page_masses = page_masses ? static_cast<float*>(page_masses->data_ptr()) : nullptr;
  p.query_token_stride = query.stride(0);
  p.query_head_stride = query.stride(1);
  p.out_token_stride = out.stride(0);
  p.out_head_stride = out.stride(1);
  p.key_page_stride = key_cache.stride(0);
  p.key_head_stride = key_cache.stride(1);
  p.value_page_stride = value_cache.stride(0);
  p.value_head_stride = value_cache.stride(1);
  p.block_table_stride = block_tables.stride(0);
  p.num_tokens = static_cast<int32_t>(query.size(0));
  p.num_sequences = static_cast<int32_t>(context_lengths.size(0));
  p.num_heads = static_cast<int32_t>(query.size(1));
  p.num_kv_heads = static_cast<int32_t>(key_cache.size(1));
  p.head_size = static_cast<int32_t>(query.size(2));
  p.num_pages = static_cast<int32_t>(key_cache.size(0));
  p.page_size = static_cast<int32_t>(key_cache.size(2));
  p.max_pages = static_cast<int32_t>(block_tables.size(1));
  p.window = static_cast<int32_t>(window);
  p.scale = static_cast<float>(scale);
  p.query_dtype = dtype_of(query);
  p.cache_dtype = dtype_of(key_cache);
  return p;
}

}  // namespace
