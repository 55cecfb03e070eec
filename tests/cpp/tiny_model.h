#pragma once

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "model/weights.h"
#include "pipeline/batch.h"
#include "pipeline/engine.h"
#include "pipeline/schedule.h"

namespace nanoflow::testing {

inline constexpr int kPageSize = 4;

/// Room for a few short requests.
inline EngineConfig tiny_config() {
  return {.max_num_batched_tokens = 64,
          .max_num_seqs = 8,
          .max_model_len = 32,
          .page_size = kPageSize,
          .num_pages = 64};
}

inline ModelSpec tiny_spec(int num_layers = 3, DType dtype = DType::kF32) {
  ModelSpec spec{.vocab_size = 61,
                 .hidden_size = 32,
                 .intermediate_size = 48,
                 .num_layers = num_layers,
                 .num_heads = 4,
                 .num_kv_heads = 2,
                 .head_dim = 8,
                 .rms_norm_eps = 1e-5f,
                 .tie_word_embeddings = false,
                 .dtype = dtype,
                 .rope_inv_freq = {}};
  for (int i = 0; i < spec.head_dim / 2; ++i) {
    spec.rope_inv_freq.push_back(std::pow(10000.0f, -2.0f * i / spec.head_dim));
  }
  return spec;
}

/// Random normal weights: large enough that logits differ clearly between tokens.
inline std::shared_ptr<Weights> random_weights(const ModelSpec& spec,
                                               std::shared_ptr<Backend> backend,
                                               bool with_o_columns = false) {
  auto weights = std::make_shared<Weights>(spec, std::move(backend), with_o_columns);
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0.0f, 0.2f);
  for (const Weights::Named& tensor : weights->tensors()) {
    size_t count = 1;
    for (int64_t extent : tensor.shape) count *= static_cast<size_t>(extent);
    std::vector<float> values(count);
    for (float& value : values) value = normal(random) + (tensor.shape.size() == 1 ? 1.0f : 0.0f);
    weights->load(tensor.name, 0, values.data(), count * sizeof(float), DType::kF32);
  }
  return weights;
}

inline Schedule sequential(int width) {
  return {.id = "sequential", .lanes = {{"all", width}}, .stages = {}, .order = {}};
}

inline Schedule pingpong(int compute, int memory) {
  return {.id = "pingpong",
          .lanes = {{"compute", compute}, {"memory", memory}},
          .stages = {{"qkv", {{0.5}, {"compute"}}},
                     {"attn", {{0.5}, {"memory"}}},
                     {"o", {{0.5}, {"compute"}}},
                     {"mlp", {{0.5}, {"compute"}}}},
          .order = {"o.0", "mlp.0", "qkv.0@+1", "o.1", "mlp.1", "qkv.1@+1"}};
}

/// A first step of whole prompts, one request each of these lengths, dealt to segments in turn;
/// every last row is sampled into the slot of its request. Pages are handed out in order.
inline Batch prompt_batch(const std::vector<int>& lengths, int segments, int page_size,
                          int vocab_size) {
  Batch batch;
  batch.request_indptr = {0};
  batch.page_indptr = {0};
  const int requests = static_cast<int>(lengths.size());
  for (int r = 0; r < requests; ++r) {
    for (int i = 0; i < lengths[r]; ++i) {
      batch.tokens.push_back((7 * r + 3 * i + 1) % vocab_size);
      batch.positions.push_back(i);
    }
    batch.request_indptr.push_back(batch.rows());
    batch.kv_len.push_back(lengths[r]);
    for (int p = 0; p * page_size < lengths[r]; ++p) {
      batch.page_indices.push_back(static_cast<int32_t>(batch.page_indices.size()));
    }
    batch.page_indptr.push_back(static_cast<int32_t>(batch.page_indices.size()));
    batch.sample_rows.push_back(batch.rows() - 1);
    batch.slots.push_back(r);
  }
  for (int s = 0; s <= segments; ++s) batch.segment_requests.push_back(s * requests / segments);
  const auto n = static_cast<size_t>(requests);
  batch.temperature.assign(n, 0.0f);
  batch.top_p.assign(n, 1.0f);
  batch.min_p.assign(n, 0.0f);
  batch.top_k.assign(n, 0);
  batch.seed.assign(n, 1);
  batch.counter.assign(n, 0);
  batch.banned_indptr.assign(n + 1, 0);
  batch.want_logits = true;
  return batch;
}

}  // namespace nanoflow::testing
