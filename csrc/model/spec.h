#pragma once

#include <vector>

#include "core/dtype.h"
#include "kernels/ops.h"

namespace nanoflow {

/// Dimensions and traits of a decoder-only model of the Llama family, or of one rank's part of it:
/// plain data.
///
/// Ranks divide the heads, the intermediate dimension and the rows of the head; where there are
/// fewer KV heads than ranks, several ranks hold the same one. In a rank's part num_heads,
/// num_kv_heads and intermediate_size are the rank's own; all else is the model's.
struct ModelSpec {
  int vocab_size = 0;         // V
  int hidden_size = 0;        // H
  int intermediate_size = 0;  // I, a multiple of GemmSiluMul::kGroup; of an expert, if any
  int num_layers = 0;
  int num_heads = 0;     // Hq
  int num_kv_heads = 0;  // Hkv, divides Hq
  int head_dim = 0;      // D, even
  float rms_norm_eps = 1e-5f;
  bool tie_word_embeddings = false;  // the head reuses the embedding table
  bool qkv_bias = false;             // added to q, k and v before the rotation
  bool qk_norm = false;              // each head of q and k is normed before the rotation
  int num_experts = 0;               // E; 0: one dense MLP
  int experts_per_token = 0;         // A
  bool norm_topk_prob = false;       // the weights of a token's experts add up to 1
  DType dtype = DType::kBF16;        // of weights, activations and KV cache
  std::vector<float> rope_inv_freq;  // [D/2] radians per position, scaling already applied
  float rope_attention_factor = 1;   // on cosines and sines
  std::vector<float> rope_local_inv_freq = {};  // [D/2] in layers with a window, there without
                                                // attention factor; or empty: as in all others
  std::vector<int> layer_windows = {};  // [layers] keys a row sees at most, 0: all; or empty: all

  Activation activation = Activation::kSilu;  // of the MLP's gate
  float embed_scale = 1;                      // on embeddings
  float attention_scale = 0;                  // on q·k; 0: D^-1/2
  bool norm_unit_offset = false;              // all norms multiply by 1 + weight
  bool post_norms = false;  // what attention and MLP add to the residual is normed before
  int rank = 0, ranks = 1;
  int kv_replicas = 1;  // ranks that hold the same KV heads

  bool has_experts() const { return num_experts > 0; }
  /// What a rank holds. Throws Error naming the dimension that does not divide.
  ModelSpec shard(int rank, int ranks) const;
  int all_heads() const { return num_heads * ranks; }  // Hq of the model
  /// Rows of the head that every rank but the last has.
  int vocab_share() const;
  int vocab_begin() const { return rank * vocab_share(); }
  int vocab_end() const;  // of this rank
  int qkv_size() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int window(int layer) const { return layer_windows.empty() ? 0 : layer_windows[layer]; }
  /// The windows that there are, each once, in the order of the layers they come with first.
  std::vector<int> distinct_windows() const;
  /// Bytes of keys and values a token keeps in all layers.
  size_t kv_bytes_per_token() const;
  /// Throws Error naming the first field that makes no sense.
  void check() const;
};

}  // namespace nanoflow
