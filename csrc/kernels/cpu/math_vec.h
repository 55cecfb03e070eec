#pragma once

// What all instruction sets share; include one of math_<isa>.h first. Only for files that are
// compiled for one instruction set, hence the anonymous namespace.

#include <cstdint>

namespace nanoflow::cpu {
namespace {

/// e^x within 1.5 units in the last place, denormal results included; 0 below -104, infinite above
/// 88.73, NaN for NaN.
inline Vec exponential(Vec x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;  // 9 bits, so that n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  x = min(splat(89.0f), max(splat(-104.0f), x));
  const Vec n = round_to_integer(x * splat(kLog2E));
  Vec r = fma(n, splat(-kLn2High), x);
  r = fma(n, splat(-kLn2Low), r);
  // e^r for |r| <= ln 2 / 2 by Taylor's series: the first term left out is below 2^-27.
  Vec p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r * r, r) + splat(1.0f);
  return times_power_of_two(p, n);
}

/// Stands for kLanes as a number of elements.
struct Whole {};

template <typename T>
inline Vec load(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline void store(T* p, Vec x, Whole) {
  store(p, x);
}

/// load() with `others` instead of zeros.
inline Vec load_or(const float* p, Whole, Vec) { return load(p); }
inline Vec load_or(const float* p, int n, Vec others) { return first_lanes(load(p, n), n, others); }

/// Calls fn(i, n) for every vector of `count` elements from element i on. n is what load() and
/// store() take: Whole, and for a last vector of less than kLanes the number of elements.
template <typename Fn>
inline void for_vectors(int64_t count, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) fn(i, Whole{});
  if (i < count) fn(i, static_cast<int>(count - i));
}

}  // namespace
}  // namespace nanoflow::cpu
