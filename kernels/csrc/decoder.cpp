// The loop over the layers: products that all threads share, and between them one pass over each row.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>

#include "observer.h"
#include "operators.h"
#include "outputs.h"
#include "store_kv.h"
#include "thread_pool.h"

namespace pagestream {
namespace {

struct DecoderScratch {};

// Adds the time of its life to a sum.
class Timer {
 public:
  explicit Timer(double& sum) : sum_(sum), begin_(std::chrono::steady_clock::now()) {}
  ~Timer() { sum_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
  double& sum_;
  const std::chrono::steady_clock::time_point begin_;
};

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t widest(const DecoderModel& m) {
  return std::max({m.hidden_size, m.intermediate_size, m.num_heads * m.head_size});
}

class Decoder {
 public:
  Decoder(const Kernels& kernels, const DecoderModel& model, const DecoderStep& step, int64_t threads)
      : kernels_(kernels),
        m_(model),
        s_(step),
        threads_(threads),
        rows_(step.attention.num_tokens),
        prefill_rows_(kernels.linear->has_prefill ? step.prefill_rows : 0) {
    heads_width_ = (m_.num_heads + 2 * m_.num_kv_heads) * m_.head_size;
    attended_width_ = m_.num_heads * m_.head_size;
    const int64_t widths[] = {m_.hidden_size,    m_.hidden_size,           heads_width_,
                              attended_width_,   2 * m_.intermediate_size, m_.head_size / 2,
                              m_.head_size / 2};
    float** const buffers[] = {&hidden_, &delta_, &heads_, &attended_, &gate_up_, &cos_, &sin_};
    int64_t floats = 0;
    for (int64_t width : widths) floats += rows_ * width;
    const int64_t quantized = quantized_bytes(rows_, prefill_rows_, widest(m_) / kGroup);
    const int64_t gated = quantized_bytes(rows_, prefill_rows_, m_.intermediate_size / kGroup);
    const int64_t inputs = whole_lines(quantized) + whole_lines(gated);
    quantized_ = thread_buffer<DecoderScratch>(inputs + floats * int64_t{sizeof(float)});
    gated_ = quantized_ + whole_lines(quantized);
    float* next = reinterpret_cast<float*>(quantized_ + inputs);
    for (size_t i = 0; i < std::size(widths); next += rows_ * widths[i++]) *buffers[i] = next;
    if (s_.observation != nullptr) observer_.emplace(*s_.observation, s_.attention, m_.num_layers);
  }

  void run() {
    s_.seconds[0] = s_.seconds[1] = 0;
    start();
    const float* bias = nullptr;
    for (int64_t l = 0; l < m_.num_layers; ++l) {
      const DecoderLayer& layer = m_.layers()[l];
      norm(l == 0 ? nullptr : delta_, bias, layer.attention_norm, layer.query_key_value);
      multiply_rows(layer.query_key_value, quantized_, heads_, heads_width_);
      append_and_attend(layer, l);
      if (l == m_.num_layers - 1) keep_sampled_rows();
      const LinearParams attended = input(layer.attention_output, quantized_, attended_, attended_width_);
      for_rows(attended_width_, [&](int64_t row) { kernels_.linear->quantize(attended, row, row + 1); });
      multiply_rows(layer.attention_output, quantized_, delta_, m_.hidden_size);
      norm(delta_, layer.attention_output.bias, layer.mlp_norm, layer.gate_up);
      multiply_and_gate(layer);
      multiply_rows(layer.down, gated_, delta_, m_.hidden_size);
      bias = layer.down.bias;
    }
    prefill_rows_ = 0;
    norm(delta_, bias, m_.norm, m_.lm_head);
    multiply_rows(m_.lm_head, quantized_, s_.logits, m_.vocab_size);
    summarize_outputs(*kernels_.rows, s_, m_.vocab_size, threads_);
  }

 private:
  template <typename F>
  void for_rows(int64_t width, const F& body) {
    constexpr int64_t kElementsAtOnce = 8192;  // some microseconds
    parallel_for(rows_, kElementsAtOnce / width + 1, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row);
    });
  }

  // The rows of a product as they are read and, once quantised, kept in `memory`.
  LinearParams input(const DecoderMatrix& matrix, char* memory, const float* from, int64_t stride) const {
    LinearParams p = {};
    p.weight = matrix.parts[0].weight;
    p.input = from;
    p.input_stride = stride;
    p.rows = rows_;
    p.prefill_rows = prefill_rows_;
    p.dtype = DType::kFloat32;
    place_quantized(p, memory);
    return p;
  }

  void multiply_rows(const DecoderMatrix& matrix, char* quantized, float* out, int64_t stride,
                     int8_t* gated = nullptr) const {
    LinearParams parts[kMaxParts];
    int count = 0;
    for (const DecoderPart& part : matrix.parts) {
      if (part.outputs == 0) break;
      LinearParams& p = parts[count++] = input(matrix, quantized, nullptr, 0);
      p.weight = part.weight;
      p.outputs = part.outputs;
      p.out = out;
      p.out_stride = stride;
      p.gated = gated;
      out += part.outputs;
    }
    const Timer timer(s_.seconds[1]);
    multiply(*kernels_.linear, parts, count, threads_);
  }

  void start() {
    const int64_t half = m_.head_size / 2;
    for_rows(m_.hidden_size, [&](int64_t row) {
      kernels_.rows->lookup(m_.embedding.parts[0].weight, s_.token_ids[row], hidden_ + row * m_.hidden_size);
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(s_.positions[row]) * m_.frequencies[i];
        cos_[row * half + i] = cosf(angle) * s_.magnitude;
        sin_[row * half + i] = sinf(angle) * s_.magnitude;
      }
    });
  }

  // hidden += delta + bias, where there are any; its norm, quantised, becomes the input of `next`.
  void norm(const float* delta, const float* bias, const float* weight, const DecoderMatrix& next) {
    const int64_t width = m_.hidden_size;
    const LinearParams normed = input(next, quantized_, delta_, width);
    for_rows(width, [&](int64_t row) {
      float* hidden = hidden_ + row * width;
      if (delta != nullptr) kernels_.rows->add(hidden, delta + row * width, width);
      if (bias != nullptr) kernels_.rows->add(hidden, bias, width);
      kernels_.rows->norm(hidden, weight, s_.epsilon, width, delta_ + row * width);
      kernels_.linear->quantize(normed, row, row + 1);
    });
  }

  void append_and_attend(const DecoderLayer& layer, int64_t index) {
    const int64_t half = m_.head_size / 2, turned = m_.num_heads + m_.num_kv_heads;
    const auto caches = [&](const void* first) {
      return static_cast<const char*>(first) + index * s_.cache_layer_bytes;
    };
    AttentionParams p = s_.attention;
    p.query = heads_;
    p.query_token_stride = heads_width_;
    p.query_head_stride = p.out_head_stride = m_.head_size;
    p.out = attended_;
    p.out_token_stride = attended_width_;
    p.window = static_cast<int32_t>(layer.window);
    p.prefill_rows = static_cast<int32_t>(prefill_rows_);
    p.key_cache = caches(s_.attention.key_cache);
    p.value_cache = caches(s_.attention.value_cache);
    if (p.cache_dtype == DType::kInt8) {
      p.key_scales += index * s_.scale_layer_stride;
      p.value_scales += index * s_.scale_layer_stride;
    }
    const StoreParams keys = {heads_ + attended_width_, const_cast<void*>(p.key_cache), s_.slots, heads_width_,
                              m_.head_size, p.key_page_stride, p.key_head_stride, p.num_kv_heads, p.head_size,
                              p.page_size, const_cast<float*>(p.key_scales), p.key_scale_page_stride,
                              p.key_scale_head_stride};
    const StoreParams values = {heads_ + turned * m_.head_size, const_cast<void*>(p.value_cache), s_.slots,
                                heads_width_, m_.head_size, p.value_page_stride, p.value_head_stride,
                                p.num_kv_heads, p.head_size, p.page_size, const_cast<float*>(p.value_scales),
                                p.value_scale_page_stride, p.value_scale_head_stride};
    const StoreToken store = store_token_for(DType::kFloat32, p.cache_dtype);
    for_rows(heads_width_, [&](int64_t row) {
      float* heads = heads_ + row * heads_width_;
      if (layer.query_key_value.bias != nullptr) kernels_.rows->add(heads, layer.query_key_value.bias, heads_width_);
      kernels_.rows->rotate(heads, turned, m_.head_size, layer.query_key_norm, s_.epsilon, cos_ + row * half,
                            sin_ + row * half);
      store(keys, row);
      store(values, row);
    });
    if (observer_) observer_->keep(p);
    {
      const Timer timer(s_.seconds[0]);
      attend(*kernels_.attention, p, plan_for(p), threads_);
    }
    if (observer_) observer_->observe(*kernels_.attention, p, index, threads_);
  }

  // Layers with the same window have the same plan.
  const Plan& plan_for(const AttentionParams& p) {
    for (const auto& [window, plan] : plans_)
      if (window == p.window) return plan;
    plans_.emplace_back(p.window, make_plan(p, threads_, kernels_.attention->partial_floats(p)));
    return plans_.back().second;
  }

  // Once the last keys are stored, only rows whose logits are wanted go on.
  void keep_sampled_rows() {
    const int64_t* end = s_.sampled_rows + s_.num_sampled;
    prefill_rows_ = end - std::lower_bound(s_.sampled_rows, end, rows_ - prefill_rows_);
    rows_ = s_.num_sampled;
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t from = s_.sampled_rows[i];  // never before i
      memmove(hidden_ + i * m_.hidden_size, hidden_ + from * m_.hidden_size, m_.hidden_size * sizeof(float));
      memmove(attended_ + i * attended_width_, attended_ + from * attended_width_, attended_width_ * sizeof(float));
    }
  }

  // The inputs of `down`. Prompt rows of one plain product pass silu on the way out: written and read again, their
  // gates would leave the caches.
  void multiply_and_gate(const DecoderLayer& layer) {
    const int64_t width = m_.intermediate_size;
    const LinearParams gated = input(layer.down, gated_, gate_up_, 2 * width);
    const bool is_plain = layer.gate_up.bias == nullptr && layer.gate_up.parts[1].outputs == 0;
    multiply_rows(layer.gate_up, quantized_, gate_up_, 2 * width, is_plain ? prefill_x(gated) : nullptr);
    for_rows(2 * width, [&](int64_t row) {
      if (is_plain && row >= rows_ - prefill_rows_) return;
      float* gate = gate_up_ + row * 2 * width;
      if (layer.gate_up.bias != nullptr) kernels_.rows->add(gate, layer.gate_up.bias, 2 * width);
      kernels_.rows->gate(gate, gate + width, width);
      kernels_.linear->quantize(gated, row, row + 1);
    });
  }

  const Kernels& kernels_;
  const DecoderModel& m_;
  const DecoderStep& s_;
  const int64_t threads_;
  int64_t rows_, prefill_rows_;
  int64_t heads_width_, attended_width_;
  float *hidden_, *delta_, *heads_, *attended_, *gate_up_, *cos_, *sin_;
  char *quantized_, *gated_;  // inputs of products; of `down`, written while gate_up's are read
  std::vector<std::pair<int32_t, Plan>> plans_;
  std::optional<Observer> observer_;
};

// What only the contents of the tensors tell; sequences are checked with the plan.
void check(const DecoderModel& m, const DecoderStep& s) {
  const int64_t capacity = int64_t{s.attention.num_pages} * s.attention.page_size, rows = s.attention.num_tokens;
  for (int64_t i = 0; i < rows; ++i) {
    if (s.token_ids[i] < 0 || s.token_ids[i] >= m.vocab_size)
      throw std::invalid_argument("token_ids: " + std::to_string(s.token_ids[i]) + " of row " + std::to_string(i) +
                                  " is outside the vocabulary of " + std::to_string(m.vocab_size));
    if (s.slots[i] < 0 || s.slots[i] >= capacity)
      throw std::invalid_argument("slots: " + std::to_string(s.slots[i]) + " of row " + std::to_string(i) +
                                  " is outside the cache of " + std::to_string(capacity) + " slots");
  }
  if (s.prefill_rows < 0 || s.prefill_rows > rows)
    throw std::invalid_argument("prefill_rows is " + std::to_string(s.prefill_rows) + " of " + std::to_string(rows));
  for (int64_t i = 0; i < s.num_sampled; ++i)
    if (s.sampled_rows[i] < (i == 0 ? 0 : s.sampled_rows[i - 1] + 1) || s.sampled_rows[i] >= rows)
      throw std::invalid_argument("sampled_rows must increase and name rows; entry " + std::to_string(i) + " is " +
                                  std::to_string(s.sampled_rows[i]) + " of " + std::to_string(rows));
  for (int32_t sequence = 0; sequence < s.attention.num_sequences; ++sequence) check_sequence(s.attention, sequence);
  if (s.observation != nullptr) check_observation(*s.observation, s.attention);
}

}  // namespace

void decode(const Kernels& kernels, const DecoderModel& model, const DecoderStep& step, int64_t threads) {
  check(model, step);
  Decoder(kernels, model, step, threads).run();
}

}  // namespace pagestream
