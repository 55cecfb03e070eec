#pragma once

// What happens to the sums of a product on their way to out; include one of math_<isa>.h first.
// Only for files that are compiled for one instruction set, hence the anonymous namespace.

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/math_vec.h"

namespace nanoflow::cpu {
namespace {

/// 1 / (1 + e^-x)
inline Vec sigmoid(Vec x) {
  const Vec e = exponential(min(x, splat(0.0f) - x));  // e^-|x|, so that nothing overflows
  const Vec numerator = where_at_least(x, splat(0.0f), splat(1.0f), e);
  return numerator * reciprocal(splat(1.0f) + e);
}

inline Vec activated(Activation activation, Vec x) {
  if (activation == Activation::kSilu) return x * sigmoid(x);
  constexpr float kTwice = 1.5957691216f;  // 2 sqrt(2 / pi): (1 + tanh(y)) / 2 is sigmoid(2 y)
  return x * sigmoid(splat(kTwice) * fma(splat(0.044715f) * x * x, x, x));
}

/// Rounds n sums of row t to out, from a column of it on, with bias and old values added.
template <typename Out>
inline void store_sums(const GemmArgs& args, int64_t t, int64_t column, Vec sums, int n) {
  Out* out = static_cast<Out*>(args.out) + t * args.out_stride + column;
  if (args.bias != nullptr) sums = sums + load(static_cast<const Out*>(args.bias) + column, n);
  if (args.accumulate) sums = sums + load(out, n);
  store(out, sums, n);
}

}  // namespace
}  // namespace nanoflow::cpu
