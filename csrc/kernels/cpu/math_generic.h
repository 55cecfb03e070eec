#pragma once

#include <bit>
#include <cstdint>

#include "core/dtype.h"

// Vectors of floats in plain C++ with the vector extension that GCC and Clang share. The other
// math_<isa>.h define the same names for their instruction set; loops are written against these
// names and compiled once a set. Vectors add, subtract, multiply and divide by operators.

namespace nanoflow::cpu {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline Vec splat(float x) { return Vec{x, x, x, x}; }

/// The first n elements, converted; lanes from n on are 0.
template <typename T>
inline Vec load(const T* p, int n) {
  Vec x{};
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}
template <typename T>
inline Vec load(const T* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])};
}

/// The first n lanes, rounded to nearest even.
template <typename T>
inline void store(T* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) p[i] = static_cast<T>(x[i]);
}
template <typename T>
inline void store(T* p, Vec x) {
  store(p, x, kLanes);
}

/// x as it is once stored as a T.
template <typename T>
inline Vec rounded(Vec x, T) {
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(static_cast<T>(x[i]));
  return x;
}

/// a * b + c, rounded once where the machine can.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
/// b where either is NaN.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
/// b where either is NaN.
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

/// 1 / x for x in [1, 2].
inline Vec reciprocal(Vec x) { return splat(1.0f) / x; }
/// To nearest, for |x| < 2^22.
inline Vec round_to_integer(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: no fraction bits are left
  return (x + shift) - shift;
}
/// x * 2^n for whole |n| < 250, also where the result is denormal or infinite.
inline Vec times_power_of_two(Vec x, Vec n) {
  const IntVec whole = __builtin_convertvector(n, IntVec);
  const IntVec half = whole >> 1;
  const Vec first = std::bit_cast<Vec>((half + 127) << 23);
  const Vec second = std::bit_cast<Vec>((whole - half + 127) << 23);
  return x * first * second;
}

/// In any lane of either.
inline bool has_nan(Vec a, Vec b) {
  const IntVec whole = (a == a) & (b == b);
  return (whole[0] & whole[1] & whole[2] & whole[3]) == 0;
}
inline Vec where_at_least(Vec x, Vec limit, Vec yes, Vec no) { return x >= limit ? yes : no; }
/// x in lanes below n, `others` in the rest.
inline Vec first_lanes(Vec x, int n, Vec others) { return IntVec{0, 1, 2, 3} < n ? x : others; }

/// Of all lanes.
inline float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
/// Of all lanes; a NaN may be overlooked.
inline float highest(Vec x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
/// Lane i is the sum of rows[i].
inline Vec sums(const Vec (&rows)[kLanes]) {
  return Vec{sum(rows[0]), sum(rows[1]), sum(rows[2]), sum(rows[3])};
}

}  // namespace
}  // namespace nanoflow::cpu
