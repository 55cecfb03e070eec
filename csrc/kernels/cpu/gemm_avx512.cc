#include "kernels/cpu/math_avx512.h"
// What is written against it:
#include "kernels/cpu/gemm_dot512.h"

namespace nanoflow::cpu {
namespace {

struct Avx512F32 : Avx512 {
  using Element = float;
  using Operand = __m512;
  static constexpr int kChunk = 16;

  static Operand load(const float* from) { return _mm512_loadu_ps(from); }
  static Operand load_part(const float* from, int count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
  }
  static void multiply_add(Sum& sum, Operand x, Operand w) { sum = _mm512_fmadd_ps(x, w, sum); }
};

struct Avx512BF16 : Avx512 {
  using Element = BFloat16;
  struct Operand {
    __m512 even, odd;
  };
  static constexpr int kChunk = 32;

  static Operand widen(__m512i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(~0xffff)))};
  }
  static Operand load(const BFloat16* from) { return widen(_mm512_loadu_si512(from)); }
  static Operand load_part(const BFloat16* from, int count) {
    return widen(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
  }
  static void multiply_add(Sum& sum, const Operand& x, const Operand& w) {
    sum = _mm512_fmadd_ps(x.odd, w.odd, _mm512_fmadd_ps(x.even, w.even, sum));
  }
};

struct Avx512F16 : Avx512 {
  using Element = Float16;
  using Operand = __m512;
  static constexpr int kChunk = 16;

  static Operand load(const Float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Operand load_part(const Float16* from, int count) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
  }
  static void multiply_add(Sum& sum, Operand x, Operand w) { sum = _mm512_fmadd_ps(x, w, sum); }
};

}  // namespace

constinit const GemmKernels kGemmAvx512F32 = dot_kernels<Avx512F32>();
constinit const GemmKernels kGemmAvx512BF16 = dot_kernels<Avx512BF16>();
constinit const GemmKernels kGemmAvx512F16 = dot_kernels<Avx512F16>();

}  // namespace nanoflow::cpu
