// Attention of some layers and what the observer says of it, without torch: for test_observer.py.
#include <cmath>

#include "observer.h"

extern const pagestream::AttentionKernel PAGESTREAM_ISA;

extern "C" {

int planted = 0;  // which mistake is made, counted from 1

struct Sizes {
  int64_t tokens, sequences, heads, kv_heads, head_size, pages, page_size, max_pages, layers;
  int64_t rows, spans, groups, page_rows, window, is_int8;
};

// query [L, T, Hq, D]; caches [L, P, Hkv, 2, B, D] and, of int8, scales [L, P, Hkv, 2, B].
void observe_layers(const Sizes& z, const float* query, const char* caches, const float* scales,
                    const int32_t* block_tables, const int32_t* query_starts, const int32_t* context_lengths,
                    const void* rows, const void* spans, void* means, float* page_masses, float* span_shares) {
  using namespace pagestream;
  const int64_t rows_of_head = 2 * z.page_size, rows_of_page = rows_of_head * z.kv_heads;
  const int64_t row_bytes = z.head_size * (z.is_int8 ? 1 : sizeof(float));
  std::vector<float> out(z.tokens * z.heads * z.head_size);
  AttentionParams p = {};
  p.out = out.data();
  p.block_tables = block_tables;
  p.query_starts = query_starts;
  p.context_lengths = context_lengths;
  p.query_token_stride = p.out_token_stride = z.heads * z.head_size;
  p.query_head_stride = p.out_head_stride = z.head_size;
  p.key_page_stride = p.value_page_stride = rows_of_page * z.head_size;
  p.key_head_stride = p.value_head_stride = rows_of_head * z.head_size;
  p.key_scale_page_stride = p.value_scale_page_stride = rows_of_page;
  p.key_scale_head_stride = p.value_scale_head_stride = rows_of_head;
  p.block_table_stride = p.max_pages = z.max_pages;
  p.num_tokens = z.tokens, p.num_sequences = z.sequences;
  p.num_heads = z.heads, p.num_kv_heads = z.kv_heads, p.head_size = z.head_size;
  p.num_pages = z.pages, p.page_size = z.page_size;
  p.window = z.window;
  p.scale = 1 / std::sqrt(float(z.head_size));
  p.query_dtype = DType::kFloat32;
  p.cache_dtype = z.is_int8 ? DType::kInt8 : DType::kFloat32;
  const Observation observation = {static_cast<const ObservedRow*>(rows), static_cast<const ObservedSpan*>(spans),
                                   z.rows, z.spans, z.groups, z.page_rows, static_cast<GroupMeans*>(means),
                                   page_masses, span_shares};
  check_observation(observation, p);
  const Observer observer(observation, p, z.layers);
  for (int64_t layer = 0; layer < z.layers; ++layer) {
    p.query = query + layer * z.tokens * z.heads * z.head_size;
    p.key_cache = caches + layer * z.pages * rows_of_page * row_bytes;
    p.value_cache = static_cast<const char*>(p.key_cache) + z.page_size * row_bytes;
    p.key_scales = scales + layer * z.pages * rows_of_page;
    p.value_scales = p.key_scales + z.page_size;
    observer.keep(p);
    attend(PAGESTREAM_ISA, p, make_plan(p, 1, PAGESTREAM_ISA.partial_floats(p)), 1);
    observer.observe(PAGESTREAM_ISA, p, layer, 1);
  }
}

}  // extern "C"
