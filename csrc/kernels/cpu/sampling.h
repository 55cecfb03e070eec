#pragma once

#include <cstdint>

namespace nanoflow::cpu {

/// Rows of logits are scanned in chunks of this many.
constexpr int64_t kLogitChunk = 64;

struct SamplingLoops {
  /// Writes the highest logit of each chunk. Returns false, and may leave chunks out, where there
  /// is a NaN.
  bool (*find_highest)(const float* logits, int64_t count, float* highest);
  /// The lowest logit that is at least `bound`, or `top` where there is none.
  float (*find_lowest)(const float* logits, int64_t count, float bound, float top);
  /// bins[i] = (top - logits[i]) * bins_per_logit rounded down, `last` for all from there on.
  void (*find_bins)(const float* logits, int64_t count, float top, float bins_per_logit, int last,
                    int32_t* bins);
  /// weights[i] = exp((logits[i] - top) * sharpness), 0 for logits below `cutoff`. Returns their
  /// sum.
  float (*weigh)(const float* logits, int64_t count, float top, float sharpness, float cutoff,
                 float* weights);
};

}  // namespace nanoflow::cpu
