#pragma once

#include <immintrin.h>

#include <cstdint>

// Include one of math_<isa>.h of AVX-512 first. Only for files that are compiled for one
// instruction set, hence the anonymous namespace.

namespace nanoflow::cpu {
namespace {

/// 16 rows of 4 floats become 4 rows of 16: out[c][r] = in[r][c]. The stride is in bytes.
inline void transpose_16x4(const void* in, int64_t stride, Vec (&out)[4]) {
  Vec rows[4];  // lane l of 128 bits of rows[i] is row 4 l + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto part = [&](int l) {
      const void* row = static_cast<const char*>(in) + (4 * l + i) * stride;
      return _mm_loadu_ps(static_cast<const float*>(row));
    };
    rows[i] = _mm512_castps128_ps512(part(0));
    rows[i] = _mm512_insertf32x4(rows[i], part(1), 1);
    rows[i] = _mm512_insertf32x4(rows[i], part(2), 2);
    rows[i] = _mm512_insertf32x4(rows[i], part(3), 3);
  }
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
  out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

/// Two rows of 32 elements of 16 bits side by side: [32, 2].
inline void store_pairs(__m512i even, __m512i odd, void* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  auto* pairs = static_cast<__m512i*>(to);
  _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(pairs + 1, _mm512_permutex2var_epi16(even, high, odd));
}

}  // namespace
}  // namespace nanoflow::cpu
