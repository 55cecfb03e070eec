#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

// Vectors of floats on AVX2 with FMA and F16C; math_generic.h says what each function does. Only
// for files that are compiled for this instruction set, hence the anonymous namespace.

namespace nanoflow::cpu {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;

inline __m256i lane_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec splat(float x) { return _mm256_set1_ps(x); }

inline Vec from_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline __m128i to_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const Vec nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i result =
      _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}

inline __m128i to_f16(Vec x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const float* p, int n) { return _mm256_maskload_ps(p, lane_mask(n)); }
template <typename T>
inline Vec load(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void store(BFloat16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x));
}
inline void store(Float16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(x)); }
inline void store(float* p, Vec x, int n) { _mm256_maskstore_ps(p, lane_mask(n), x); }
template <typename T>
inline void store(T* p, Vec x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

inline Vec rounded(Vec x, float) { return x; }
inline Vec rounded(Vec x, BFloat16) { return from_bf16(to_bf16(x)); }
inline Vec rounded(Vec x, Float16) { return _mm256_cvtph_ps(to_f16(x)); }

inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec reciprocal(Vec x) { return splat(1.0f) / x; }
inline Vec round_to_integer(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec times_power_of_two(Vec x, Vec n) {
  const auto power = [](__m256i exponent) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  };
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return x * power(half) * power(_mm256_sub_epi32(whole, half));
}

inline bool has_nan(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0;
}
inline Vec where_at_least(Vec x, Vec limit, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, limit, _CMP_GE_OQ));
}
inline Vec first_lanes(Vec x, int n, Vec others) {
  return _mm256_blendv_ps(others, x, _mm256_castsi256_ps(lane_mask(n)));
}

inline float sum(Vec x) {
  __m128 half = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
  half = half + _mm_movehl_ps(half, half);
  return _mm_cvtss_f32(half) + _mm_cvtss_f32(_mm_movehdup_ps(half));
}
inline float highest(Vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

/// Four vectors to one: lane l of each 128 bits is the sum of that part of rows[l].
inline Vec sums_of_four(const Vec* rows) {
  const Vec ab = _mm256_unpacklo_ps(rows[0], rows[1]) + _mm256_unpackhi_ps(rows[0], rows[1]);
  const Vec cd = _mm256_unpacklo_ps(rows[2], rows[3]) + _mm256_unpackhi_ps(rows[2], rows[3]);
  const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
  const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
  return _mm256_castpd_ps(low) + _mm256_castpd_ps(high);
}

inline Vec sums(const Vec (&rows)[kLanes]) {
  const Vec a = sums_of_four(rows), b = sums_of_four(rows + 4);
  return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
}

}  // namespace
}  // namespace nanoflow::cpu
