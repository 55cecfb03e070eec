#pragma once

#include "kernels/cpu/gemm_dot.h"

// What the AVX-512 files share; include one of their math_<isa>.h first. The anonymous namespace is
// meant: each file gets its own, compiled with its own flags.

namespace nanoflow::cpu {
namespace {

/// Two vectors to one that holds the sums of their halves, quarters, ...: (a, b) by the shuffles
/// given.
template <int kLow, int kHigh>
__m512 fold(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, kLow), _mm512_shuffle_f32x4(a, b, kHigh));
}

struct Avx512 {
  using Sum = __m512;
  static constexpr int kRows = 4, kColumns = 4;

  static void reduce(const Sum* sums, float* out) {
    __m512 columns[4];  // quarter i: four partial sums of row i
    for (int j = 0; j < 4; ++j) {
      const __m512 low = fold<0x44, 0xee>(sums[j], sums[4 + j]);
      const __m512 high = fold<0x44, 0xee>(sums[8 + j], sums[12 + j]);
      columns[j] = fold<0x88, 0xdd>(low, high);
    }
    const auto add_pairs = [](__m512 a, __m512 b) {  // in each quarter a0+a2, b0+b2, a1+a3, b1+b3
      return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const __m512d a = _mm512_castps_pd(add_pairs(columns[0], columns[1]));
    const __m512d b = _mm512_castps_pd(add_pairs(columns[2], columns[3]));
    _mm512_store_ps(out, _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                       _mm512_castpd_ps(_mm512_unpackhi_pd(a, b))));
  }
};

}  // namespace
}  // namespace nanoflow::cpu
