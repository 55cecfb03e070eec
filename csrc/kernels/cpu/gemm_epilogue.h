#pragma once

// What happens to the sums of a product on their way to out; include one of math_<isa>.h first.
// Only for files that are compiled for one instruction set, hence the anonymous namespace.

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/math_vec.h"

namespace nanoflow::cpu {
namespace {

inline Vec silu(Vec x) {
  const Vec e = exponential(min(x, splat(0.0f) - x));  // e^-|x|, so that nothing overflows
  const Vec numerator = where_at_least(x, splat(0.0f), splat(1.0f), e);
  return x * (numerator * reciprocal(splat(1.0f) + e));
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
