// Executes CUDA kernels on the CPU for test_cuda_source_on_host.py. Requests come on stdin and answers go to stdout,
// both as int64 sizes and raw arrays; host_gpu.py is the other end. Each array lies in an allocation of exactly its
// size, so that AddressSanitizer sees every access beyond it.
#include <machine.h>

#include <memory>

#include "cuda/append.h"
#include "cuda/attention.h"
#include "cuda/statistics.h"

namespace pagestream::gpu {
namespace {

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

class Array {
 public:
  Array() {
    int64_t bytes = 0;
    if (!read(&bytes, sizeof bytes)) std::exit(2);
    size_ = static_cast<size_t>(bytes);
    data_.reset(static_cast<unsigned char*>(std::malloc(size_)));
    if (!read(data_.get(), size_)) std::exit(2);
  }
  template <typename T>
  T* as() {
    return size_ == 0 ? nullptr : reinterpret_cast<T*>(data_.get());
  }
  void poison() { std::memset(data_.get(), 0xff, size_); }  // NaN
  void send() const {
    if (size_ > 0) std::fwrite(data_.get(), 1, size_, stdout);
  }

 private:
  struct Free {
    void operator()(unsigned char* data) const { std::free(data); }
  };
  std::unique_ptr<unsigned char, Free> data_;
  size_t size_ = 0;
};

struct Sizes {
  int64_t command, seed, num_blocks, dtype, cache_dtype, num_sequences, num_heads, num_kv_heads, head_size, page_size;
  int64_t max_pages, window;
  int64_t query_token_stride, query_head_stride, page_stride, head_stride;
  double scale;  // append: epsilon
};

enum Command : int64_t { kPlan, kAttention, kAppend };

void plan(const GpuParams& p, uint32_t seed) {
  launch(1, kPlanThreads, kPlanThreads * sizeof(int64_t), seed,
         [&](unsigned char* shared) { Planner(p, reinterpret_cast<int64_t*>(shared)).run(); });
}

template <typename T, typename Cache, int kHeadSize, typename Stats>
void attend(const GpuParams& p, uint32_t seed) {
  launch(p.workspace.max_blocks, kThreads, AttentionBlock<T, Cache, kHeadSize, Stats>::kSharedBytes, seed,
         [&](unsigned char* shared) { AttentionBlock<T, Cache, kHeadSize, Stats>(p, shared).run(); });
}

template <typename T, typename Cache, int kHeadSize>
void attend(const GpuParams& p, uint32_t seed) {
  const bool with_statistics = p.stats != nullptr || p.page_masses != nullptr;
  with_statistics ? attend<T, Cache, kHeadSize, Statistics>(p, seed)
                  : attend<T, Cache, kHeadSize, NoStatistics>(p, seed);
}

template <typename T, typename Cache>
void attend_as(const GpuParams& p, uint32_t seed) {
  switch (p.head_size) {
    case 64: return attend<T, Cache, 64>(p, seed);
    case 80: return attend<T, Cache, 80>(p, seed);
    case 96: return attend<T, Cache, 96>(p, seed);
    case 128: return attend<T, Cache, 128>(p, seed);
    default: std::exit(2);
  }
}

template <typename T>
void attend_as(const GpuParams& p, uint32_t seed) {
  p.cache_dtype == DType::kFloat8 ? attend_as<T, Float8>(p, seed) : attend_as<T, T>(p, seed);
}

// Every segment of every block, as seven int64: block, sequence, KV head, row block, tile, tiles, tiles of the row
// block.
void send_segments(const GpuParams& p) {
  std::vector<int64_t> all;
  Walk walk;
  for (int block = 0; block < p.workspace.max_blocks; ++block)
    for (walk.begin(p, block); !walk.done(); walk.next(p)) {
      const Segment& s = walk.now();
      all.insert(all.end(), {block, s.sequence, s.kv_head, s.row_block, s.tile, s.num_tiles, s.block_tiles});
    }
  const int64_t size = static_cast<int64_t>(all.size());
  std::fwrite(&size, sizeof size, 1, stdout);
  if (size > 0) std::fwrite(all.data(), sizeof(int64_t), all.size(), stdout);
}

int shift_of(int64_t page_size) { return static_cast<int>(std::lround(std::log2(static_cast<double>(page_size)))); }

GpuParams params_of(const Sizes& sizes) {
  GpuParams p{};
  p.query_token_stride = sizes.query_token_stride;
  p.query_head_stride = sizes.query_head_stride;
  p.out_token_stride = sizes.num_heads * sizes.head_size;
  p.out_head_stride = sizes.head_size;
  p.key_page_stride = p.value_page_stride = sizes.page_stride;
  p.key_head_stride = p.value_head_stride = sizes.head_stride;
  p.block_table_stride = sizes.max_pages;
  p.num_sequences = static_cast<int32_t>(sizes.num_sequences);
  p.num_heads = static_cast<int32_t>(sizes.num_heads);
  p.num_kv_heads = static_cast<int32_t>(sizes.num_kv_heads);
  p.head_size = static_cast<int32_t>(sizes.head_size);
  p.page_size = static_cast<int32_t>(sizes.page_size);
  p.max_pages = static_cast<int32_t>(sizes.max_pages);
  p.window = static_cast<int32_t>(sizes.window);
  p.scale = static_cast<float>(sizes.scale);
  p.page_shift = shift_of(sizes.page_size);
  p.query_dtype = static_cast<DType>(sizes.dtype);
  p.cache_dtype = static_cast<DType>(sizes.cache_dtype);
  return p;
}

template <typename T, typename Cache>
void append_as(const AppendParams& p, uint32_t seed) {
  const int warps = p.num_tokens * (p.num_heads + 2 * p.num_kv_heads);
  const int blocks = (warps * kWarpSize + kAppendThreads - 1) / kAppendThreads;
  launch(blocks, kAppendThreads, 0, seed, [&](unsigned char*) { AppendWarp<T, Cache>(p).run(); });
}

template <typename T>
void append_as(const AppendParams& p, uint32_t seed) {
  p.cache_dtype == DType::kFloat8 ? append_as<T, Float8>(p, seed) : append_as<T, T>(p, seed);
}

// num_sequences stands for tokens, max_pages for pages, query strides for those of the heads.
void serve_append(const Sizes& sizes) {
  Array heads, cos, signed_sin, norm_weight, keys, values, slots, key_scales, value_scales;
  AppendParams p{};
  p.heads = heads.as<void>();
  p.cos = cos.as<float>();
  p.signed_sin = signed_sin.as<float>();
  p.norm_weight = norm_weight.as<void>();
  p.key_cache = keys.as<void>();
  p.value_cache = values.as<void>();
  p.slots = slots.as<int64_t>();
  p.key_scales = key_scales.as<float>();
  p.value_scales = value_scales.as<float>();
  p.token_stride = sizes.query_token_stride;
  p.head_stride = sizes.query_head_stride;
  p.key_page_stride = p.value_page_stride = sizes.page_stride;
  p.key_head_stride = p.value_head_stride = sizes.head_stride;
  p.num_tokens = static_cast<int32_t>(sizes.num_sequences);
  p.num_heads = static_cast<int32_t>(sizes.num_heads);
  p.num_kv_heads = static_cast<int32_t>(sizes.num_kv_heads);
  p.head_size = static_cast<int32_t>(sizes.head_size);
  p.num_pages = static_cast<int32_t>(sizes.max_pages);
  p.page_size = static_cast<int32_t>(sizes.page_size);
  p.epsilon = static_cast<float>(sizes.scale);
  p.dtype = static_cast<DType>(sizes.dtype);
  p.cache_dtype = static_cast<DType>(sizes.cache_dtype);
  const auto seed = static_cast<uint32_t>(sizes.seed);
  p.dtype == DType::kFloat16 ? append_as<Float16>(p, seed) : append_as<BFloat16>(p, seed);
  heads.send();
  keys.send();
  values.send();
}

void serve(const Sizes& sizes) {
  if (sizes.command == kAppend) return serve_append(sizes);
  Array starts, lengths, workspace, query, keys, values, key_scales, value_scales, tables;
  Array out, stats, page_masses;
  GpuParams p = params_of(sizes);
  p.query_starts = starts.as<int32_t>();
  p.context_lengths = lengths.as<int32_t>();
  p.workspace = Workspace(workspace.as<float>(), static_cast<int32_t>(sizes.num_blocks), sizes.head_size);
  p.query = query.as<void>();
  p.key_cache = keys.as<void>();
  p.value_cache = values.as<void>();
  p.key_scales = key_scales.as<float>();
  p.value_scales = value_scales.as<float>();
  p.block_tables = tables.as<int32_t>();
  p.out = out.as<void>();
  p.stats = stats.as<float>();
  p.page_masses = page_masses.as<float>();
  p.slice_masses = sizes.page_size == kSliceKeys ? p.page_masses : p.workspace.slices;
  const auto seed = static_cast<uint32_t>(sizes.seed);
  plan(p, seed);
  if (sizes.command == kPlan) return send_segments(p);
  // Twice, as two layers of a step would: the counters must be ready for the second.
  for (uint32_t layer = 0; layer < 2; ++layer) {
    for (Array* output : {&out, &stats, &page_masses}) output->poison();
    p.query_dtype == DType::kFloat16 ? attend_as<Float16>(p, seed + layer) : attend_as<BFloat16>(p, seed + layer);
  }
  out.send();
  stats.send();
  page_masses.send();
}

}  // namespace
}  // namespace pagestream::gpu

int main() {
  for (pagestream::gpu::Sizes sizes; pagestream::gpu::read(&sizes, sizeof sizes); std::fflush(stdout))
    pagestream::gpu::serve(sizes);
}
