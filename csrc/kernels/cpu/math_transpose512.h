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

}  // namespace
}  // namespace nanoflow::cpu
