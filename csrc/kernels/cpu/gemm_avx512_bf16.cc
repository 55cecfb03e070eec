#include "kernels/cpu/math_avx512_bf16.h"
// What is written against it:
#include "kernels/cpu/gemm_dot512.h"

namespace nanoflow::cpu {
namespace {

struct Avx512Bf16BF16 : Avx512 {
  using Element = BFloat16;
  using Operand = __m512bh;
  static constexpr int kChunk = 32;

  static Operand load(const BFloat16* from) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
  }
  static Operand load_part(const BFloat16* from, int count) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
  }
  static void multiply_add(Sum& sum, Operand x, Operand w) { sum = _mm512_dpbf16_ps(sum, x, w); }
};

}  // namespace

constinit const GemmKernels kGemmAvx512Bf16BF16 = dot_kernels<Avx512Bf16BF16>();

}  // namespace nanoflow::cpu
