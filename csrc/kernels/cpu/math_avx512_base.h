#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/dtype.h"

// Vectors of floats on AVX-512, all but their rounding to bfloat16; math_generic.h says what each
// function does. Only for files that are compiled for this instruction set, hence the anonymous
// namespace.

namespace nanoflow::cpu {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;

inline __mmask16 lane_mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Vec splat(float x) { return _mm512_set1_ps(x); }

inline Vec from_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/// Rounded to nearest even; defined by the headers that include this one.
inline __m256i to_bf16(Vec x);

inline __m256i to_f16(Vec x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(lane_mask(n), p); }
inline Vec load(const BFloat16* p, int n) {
  return from_bf16(_mm256_maskz_loadu_epi16(lane_mask(n), p));
}
inline Vec load(const Float16* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(n), p));
}

inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(BFloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x));
}
inline void store(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(x));
}
inline void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), x); }
inline void store(BFloat16* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), to_bf16(x));
}
inline void store(Float16* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), to_f16(x));
}

inline Vec rounded(Vec x, float) { return x; }
inline Vec rounded(Vec x, BFloat16) { return from_bf16(to_bf16(x)); }
inline Vec rounded(Vec x, Float16) { return _mm512_cvtph_ps(to_f16(x)); }

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec reciprocal(Vec x) {  // a division takes 16 cycles
  const Vec guess = _mm512_rcp14_ps(x);
  return fma(guess, _mm512_fnmadd_ps(x, guess, splat(1.0f)), guess);
}
inline Vec round_to_integer(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec times_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

inline bool has_nan(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0; }
inline Vec where_at_least(Vec x, Vec limit, Vec yes, Vec no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), yes);
}
inline Vec first_lanes(Vec x, int n, Vec others) {
  return _mm512_mask_mov_ps(others, lane_mask(n), x);
}

inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float highest(Vec x) { return _mm512_reduce_max_ps(x); }

/// Four vectors to one: lane l of each 128 bits is the sum of that part of rows[l].
inline Vec sums_of_four(const Vec* rows) {
  const Vec ab = _mm512_unpacklo_ps(rows[0], rows[1]) + _mm512_unpackhi_ps(rows[0], rows[1]);
  const Vec cd = _mm512_unpacklo_ps(rows[2], rows[3]) + _mm512_unpackhi_ps(rows[2], rows[3]);
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  return _mm512_castpd_ps(low) + _mm512_castpd_ps(high);
}

inline Vec sums_of_parts(Vec a, Vec b) {
  return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}

inline Vec sums(const Vec (&rows)[kLanes]) {
  return sums_of_parts(sums_of_parts(sums_of_four(rows), sums_of_four(rows + 4)),
                       sums_of_parts(sums_of_four(rows + 8), sums_of_four(rows + 12)));
}

}  // namespace
}  // namespace nanoflow::cpu
