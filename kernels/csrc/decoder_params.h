// A network of quantised matrices, and one step of it, as plain structs. The structs of the network are what decoder.py
// writes: 64-bit numbers and pointers in this order.
#pragma once

#include "linear_params.h"

namespace pagestream {

constexpr int kMaxParts = 3;  // matrices of different bits that are one product: query, key, value

struct DecoderPart {
  PackedWeight weight;
  int64_t outputs;  // 0: there is no such part
};

struct DecoderMatrix {
  const float* bias;  // [outputs of all parts] or null
  DecoderPart parts[kMaxParts];
};

struct DecoderLayer {
  int64_t window;               // 0: none
  const float* attention_norm;  // [E]
  const float* query_key_norm;  // [Hq + Hkv, D] or null
  const float* mlp_norm;        // [E]
  DecoderMatrix query_key_value, attention_output, gate_up, down;
};

struct DecoderModel {
  int64_t num_layers, num_heads, num_kv_heads, head_size, hidden_size, intermediate_size, vocab_size;
  const float* frequencies;  // [D / 2], radians per position
  const float* norm;         // [E]
  DecoderMatrix embedding, lm_head;

  const DecoderLayer* layers() const { return reinterpret_cast<const DecoderLayer*>(this + 1); }
};

// Means over the layers and heads of a third of the network; of what leaves position 0 out, over those that put more
// than kLeastRest elsewhere. summary.py reads it as floats.
struct GroupMeans {
  float heads;
  float entropy, entropy_min, entropy_max, sink, recent, p_max;
  float rest_heads, entropy_rest, log2_distance;
  float bands[kBands];
};

// The rows of a step whose attention is observed. L: layers; G: groups; P: rows that ask for pages; M: max_pages.
struct Observation {
  const ObservedRow* rows;    // [O], rising
  const ObservedSpan* spans;  // [N], in the order of their rows
  int64_t num_rows, num_spans, num_groups, num_page_rows;  // O, N, G, P
  GroupMeans* means;   // [O, G]
  float* page_masses;  // [P, L, Hq, 1 + M], zeros before: of position 0, of each page
  float* span_shares;  // [N, L, Hq, 2]: mass, <o_span, o> / |o|^2
};

// A row of logits, over the vocabulary. outputs.py reads it as doubles.
struct OutputSummary {
  double token;                 // the likeliest; of several the first
  double largest;               // its logit; NaN if one is
  double entropy, top1, margin;  // where asked for: of the softmax, nats; its largest value; that less the second
};

// The same of a part of the vocabulary.
struct OutputPart {
  int32_t token;
  float largest, second;  // second: -inf where there is none
  float sum, log_sum;     // where asked for: of w = 2^x and of w x; x: log2 e (logit - largest)
};

struct DecoderStep {
  const int64_t *token_ids, *positions, *slots;  // [T]
  int64_t prefill_rows;                          // the last of the T rows, multiplied as such (linear_params.h)
  const int64_t* sampled_rows;                   // [R], increasing
  int64_t num_sampled;                           // R
  float* logits;                                 // [R, V]
  OutputSummary* summary;                        // [R]
  const bool* with_statistics;                   // [R] or null: of none
  float epsilon, magnitude;                      // of the norms; of cosines and sines
  int64_t cache_layer_bytes;                     // from one layer's caches to the next one's
  int64_t scale_layer_stride;                    // likewise, floats, of int8 caches
  AttentionParams attention;                     // all but query, out and window; the caches are those of layer 0
  const Observation* observation;                // or null
  double* seconds;                               // [2]: what attention and what products took
};

// One build of rows.cpp for one instruction set: what happens to a row between two products.
struct RowKernel {
  void (*lookup)(const PackedWeight&, int64_t output, float* to);  // the weights of an output
  void (*add)(float* to, const float* what, int64_t width);
  void (*norm)(const float* row, const float* weight, float epsilon, int64_t width, float* out);
  // Turns each pair (i, i + D/2) of `count` heads, normed before where there is a weight [count, D].
  void (*rotate)(float* heads, int64_t count, int64_t head_size, const float* norm_weight, float epsilon,
                 const float* cos, const float* sin);
  void (*gate)(float* gate, const float* up, int64_t width);  // gate = silu(gate) * up
  OutputPart (*summarize)(const float* logits, int64_t begin, int64_t end, bool with_statistics);
};

}  // namespace pagestream
