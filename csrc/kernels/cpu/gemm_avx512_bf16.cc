#include "kernels/cpu/gemm_dot512.h"

namespace nanoflow::cpu {
namespace {

struct Avx512Bf16BF16 : Avx512 {
  using Element = Bf16;
  using Operand = __m512bh;
  static constexpr int kChunk = 32;

  static Operand load(const Bf16* from) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
  }
  static Operand load_part(const Bf16* from, int count) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
  }
  static void multiply_add(Sum& sum, Operand x, Operand w) { sum = _mm512_dpbf16_ps(sum, x, w); }

  using Avx512::store;
  static void store(Bf16* out, const float* values, int count) {
    const auto four = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(_mm_load_ps(values)));
    _mm_mask_storeu_epi16(out, first(count), four);
  }
};

}  // namespace

constinit const GemmKernels kGemmAvx512Bf16BF16 = dot_kernels<Avx512Bf16BF16>();

}  // namespace nanoflow::cpu
