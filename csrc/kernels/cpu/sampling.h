#pragma once

#include <cstdint>

namespace nanoflow::cpu {

/// Rows of logits are scanned in chunks of this many.
constexpr int64_t kLogitChunk = 64;

struct SamplingLoops {
  /// Writes the highest logit of each chunk. Returns false, and may leave chunks out, where there
  /// is a NaN.
  bool (*find_highest)(const float* logits, int64_t count, float* highest);
  /// weights[i] = exp((logits[i] - top) / temperature), 0 for logits below `cutoff`. Returns their
  /// sum.
  float (*weigh)(const float* logits, int64_t count, float top, float temperature, float cutoff,
                 float* weights);
};

}  // namespace nanoflow::cpu
