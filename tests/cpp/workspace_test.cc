#include "pipeline/workspace.h"

#include <doctest/doctest.h>

#include "recording_backend.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

/// Pads rows as a GPU does. Its memory is never touched, and so takes none.
class WideBackend : public RecordingBackend {
 public:
  WideBackend() : RecordingBackend(132) {}
  int row_granularity() const override { return 64; }
};

}  // namespace

TEST_CASE("the buffers of an 8B model leave a GPU's memory to the KV cache") {
  ModelSpec spec{.vocab_size = 128256,
                 .hidden_size = 4096,
                 .intermediate_size = 14336,
                 .num_layers = 32,
                 .num_heads = 32,
                 .num_kv_heads = 8,
                 .head_dim = 128,
                 .dtype = DType::kBF16,
                 .rope_inv_freq = std::vector<float>(64, 1.0f)};
  WideBackend backend;
  const Workspace workspace({.max_num_batched_tokens = 2048,
                             .max_num_seqs = 512,
                             .max_model_len = 131072,
                             .page_size = 64},
                            spec, backend);
  const size_t mib = workspace.bytes() >> 20;
  CHECK(mib <= 788);
  CHECK(mib >= 256);  // the logits alone are 250
}
