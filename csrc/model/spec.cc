#include "model/spec.h"

#include <algorithm>

#include "core/error.h"

namespace nanoflow {

size_t ModelSpec::kv_bytes_per_token() const {
  return static_cast<size_t>(num_layers) * 2 * num_kv_heads * head_dim * size_of(dtype);
}

std::vector<int> ModelSpec::distinct_windows() const {
  std::vector<int> windows;
  for (int layer = 0; layer < num_layers; ++layer) {
    if (std::find(windows.begin(), windows.end(), window(layer)) == windows.end()) {
      windows.push_back(window(layer));
    }
  }
  return windows;
}

ModelSpec ModelSpec::shard(int own_rank, int num_ranks) const {
  NF_CHECK(ranks == 1 && num_ranks >= 1 && own_rank >= 0 && own_rank < num_ranks,
           "model spec: rank ", own_rank, " of ", num_ranks, ", of a part for rank ", rank, " of ",
           ranks);
  const auto divide = [&](const char* name, int value) {
    NF_CHECK(value % num_ranks == 0, "tensor_parallel_size ", num_ranks, " does not divide ", name,
             " ", value, "; choose one that does");
    return value / num_ranks;
  };
  ModelSpec part = *this;
  part.rank = own_rank;
  part.ranks = num_ranks;
  part.num_heads = divide("num_heads", num_heads);
  divide("hidden_size", hidden_size);
  part.intermediate_size = divide("intermediate_size", intermediate_size);
  NF_CHECK(part.intermediate_size % GemmSiluMul::kGroup == 0, "tensor_parallel_size ", num_ranks,
           " leaves a rank ", part.intermediate_size, " of intermediate_size ", intermediate_size,
           ", no multiple of ", GemmSiluMul::kGroup);
  if (num_kv_heads < num_ranks) {
    NF_CHECK(num_ranks % num_kv_heads == 0, "tensor_parallel_size ", num_ranks,
             " is no multiple of num_kv_heads ", num_kv_heads);
    part.num_kv_heads = 1;
    part.kv_replicas = num_ranks / num_kv_heads;
  } else {
    part.num_kv_heads = divide("num_kv_heads", num_kv_heads);
  }
  NF_CHECK(part.vocab_share() * (num_ranks - 1) < vocab_size, "tensor_parallel_size ", num_ranks,
           " leaves a rank no row of vocab_size ", vocab_size);
  return part;
}

int ModelSpec::vocab_share() const {
  constexpr int kRows = 8;  // of a GPU's products: their columns are multiples
  const int share = (vocab_size + ranks - 1) / ranks;
  return ranks == 1 ? share : (share + kRows - 1) / kRows * kRows;
}

int ModelSpec::vocab_end() const { return std::min(vocab_size, vocab_begin() + vocab_share()); }

void ModelSpec::check() const {
  const auto positive = [](const char* name, int value) {
    NF_CHECK(value > 0, "model spec: ", name, " is ", value, " but must be positive");
  };
  positive("vocab_size", vocab_size);
  positive("hidden_size", hidden_size);
  positive("intermediate_size", intermediate_size);
  positive("num_layers", num_layers);
  positive("num_heads", num_heads);
  positive("num_kv_heads", num_kv_heads);
  positive("head_dim", head_dim);
  NF_CHECK(intermediate_size % GemmSiluMul::kGroup == 0, "model spec: intermediate_size ",
           intermediate_size, " is no multiple of ", GemmSiluMul::kGroup);
  NF_CHECK(num_experts == 0 ? experts_per_token == 0
                            : experts_per_token >= 1 && experts_per_token <= num_experts,
           "model spec: experts_per_token is ", experts_per_token, " of ", num_experts, " experts");
  NF_CHECK(num_heads % num_kv_heads == 0, "model spec: num_kv_heads ", num_kv_heads,
           " does not divide num_heads ", num_heads);
  NF_CHECK(head_dim % 2 == 0, "model spec: head_dim ", head_dim, " is odd");
  NF_CHECK(rope_inv_freq.size() * 2 == static_cast<size_t>(head_dim),
           "model spec: rope_inv_freq has ", rope_inv_freq.size(), " values but head_dim ",
           head_dim, " needs ", head_dim / 2);
  NF_CHECK(rope_local_inv_freq.empty() || rope_local_inv_freq.size() == rope_inv_freq.size(),
           "model spec: rope_local_inv_freq has ", rope_local_inv_freq.size(),
           " values and rope_inv_freq ", rope_inv_freq.size());
  NF_CHECK(embed_scale > 0 && attention_scale >= 0, "model spec: embed_scale is ", embed_scale,
           " and attention_scale ", attention_scale);
  NF_CHECK(!has_experts() || (!post_norms && activation == Activation::kSilu),
           "model spec: experts have a SiLU gate and no norm behind them");
  NF_CHECK(rope_attention_factor > 0, "model spec: rope_attention_factor is ",
           rope_attention_factor);
  NF_CHECK(layer_windows.empty() || layer_windows.size() == static_cast<size_t>(num_layers),
           "model spec: layer_windows has ", layer_windows.size(), " values for ", num_layers,
           " layers");
  for (int window : layer_windows) {
    NF_CHECK(window >= 0, "model spec: a window is ", window, "; 0 is none");
  }
  NF_CHECK(rms_norm_eps > 0, "model spec: rms_norm_eps is ", rms_norm_eps);
  dispatch_float(dtype, "model spec", [](auto) {});
}

}  // namespace nanoflow
