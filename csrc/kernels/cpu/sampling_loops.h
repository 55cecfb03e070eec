#pragma once

// The loops of sampling.h; include one of math_<isa>.h first. Only for files that are compiled for
// one instruction set, hence the anonymous namespace.

#include "kernels/cpu/math_vec.h"
#include "kernels/cpu/sampling.h"

namespace nanoflow::cpu {
namespace {

inline bool find_highest(const float* logits, int64_t count, float* highest_of) {
  constexpr int kVectors = kLogitChunk / kLanes;
  const Vec lowest = splat(-__builtin_inff());
  int64_t begin = 0;
  for (; begin + kLogitChunk <= count; begin += kLogitChunk) {
    Vec best = lowest;
    bool is_bad = false;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i += 2) {
      const Vec a = load(logits + begin + i * kLanes);
      const Vec b = load(logits + begin + (i + 1) * kLanes);
      is_bad |= has_nan(a, b);
      best = max(best, max(a, b));
    }
    if (is_bad) return false;
    *highest_of++ = highest(best);
  }
  if (begin == count) return true;
  Vec best = lowest;
  bool is_bad = false;
  for_vectors(count - begin, [&](int64_t i, auto n) {
    const Vec x = load_or(logits + begin + i, n, lowest);
    is_bad |= has_nan(x, x);
    best = max(best, x);
  });
  *highest_of = highest(best);
  return !is_bad;
}

inline float find_lowest(const float* logits, int64_t count, float bound, float top) {
  Vec lowest = splat(top);
  for_vectors(count, [&](int64_t i, auto n) {
    const Vec x = load_or(logits + i, n, splat(top));
    lowest = min(lowest, where_at_least(x, splat(bound), x, splat(top)));
  });
  return -highest(splat(0.0f) - lowest);
}

inline void find_bins(const float* logits, int64_t count, float top, float bins_per_logit, int last,
                      int32_t* bins) {
  const float limit = static_cast<float>(last);
  for (int64_t i = 0; i < count; ++i) {
    const float bin = (top - logits[i]) * bins_per_logit;
    bins[i] = static_cast<int32_t>(bin < limit ? bin : limit);
  }
}

inline float weigh(const float* logits, int64_t count, float top, float sharpness, float cutoff,
                   float* weights) {
  const Vec lowest = splat(-__builtin_inff());
  Vec total = splat(0.0f);
  for_vectors(count, [&](int64_t i, auto n) {
    const Vec x = load_or(logits + i, n, lowest);
    const Vec weight = exponential((x - splat(top)) * splat(sharpness));
    const Vec kept = where_at_least(x, splat(cutoff), weight, splat(0.0f));
    store(weights + i, kept, n);
    total = total + kept;
  });
  return sum(total);
}

constexpr SamplingLoops kSamplingLoops{&find_highest, &find_lowest, &find_bins, &weigh};

}  // namespace
}  // namespace nanoflow::cpu
