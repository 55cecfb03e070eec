#include "model/spec.h"

#include "core/error.h"
#include "kernels/ops.h"

namespace nanoflow {

size_t ModelSpec::kv_bytes_per_token() const {
  return static_cast<size_t>(num_layers) * 2 * num_kv_heads * head_dim * size_of(dtype);
}

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
  NF_CHECK(num_heads % num_kv_heads == 0, "model spec: num_kv_heads ", num_kv_heads,
           " does not divide num_heads ", num_heads);
  NF_CHECK(head_dim % 2 == 0, "model spec: head_dim ", head_dim, " is odd");
  NF_CHECK(rope_inv_freq.size() * 2 == static_cast<size_t>(head_dim),
           "model spec: rope_inv_freq has ", rope_inv_freq.size(), " values but head_dim ",
           head_dim, " needs ", head_dim / 2);
  NF_CHECK(rms_norm_eps > 0, "model spec: rms_norm_eps is ", rms_norm_eps);
  dispatch_float(dtype, "model spec", [](auto) {});
}

}  // namespace nanoflow
