#include <cstring>

#include "kernels/cpu/math_avx2.h"
// What is written against it:
#include "kernels/cpu/gemm_dot.h"

namespace nanoflow::cpu {
namespace {

struct Avx2 {
  using Sum = __m256;
  static constexpr int kRows = 2, kColumns = 4;

  static void reduce(const Sum* sums, float* out) {
    for (int i = 0; i < kRows * kColumns; i += 4) {
      const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(sums[i], sums[i + 1]),
                                         _mm256_hadd_ps(sums[i + 2], sums[i + 3]));
      _mm_store_ps(out + i,
                   _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
    }
  }

  template <typename Simd>
  static typename Simd::Operand load_padded(const typename Simd::Element* from, int count) {
    typename Simd::Element padded[Simd::kChunk] = {};
    std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(typename Simd::Element));
    return Simd::load(padded);
  }
};

struct Avx2F32 : Avx2 {
  using Element = float;
  using Operand = __m256;
  static constexpr int kChunk = 8;

  static Operand load(const float* from) { return _mm256_loadu_ps(from); }
  static Operand load_part(const float* from, int count) {
    return load_padded<Avx2F32>(from, count);
  }
  static void multiply_add(Sum& sum, Operand x, Operand w) { sum = _mm256_fmadd_ps(x, w, sum); }
};

struct Avx2BF16 : Avx2 {
  using Element = BFloat16;
  struct Operand {
    __m256 even, odd;
  };
  static constexpr int kChunk = 16;

  static Operand load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(~0xffff)))};
  }
  static Operand load_part(const BFloat16* from, int count) {
    return load_padded<Avx2BF16>(from, count);
  }
  static void multiply_add(Sum& sum, const Operand& x, const Operand& w) {
    sum = _mm256_fmadd_ps(x.odd, w.odd, _mm256_fmadd_ps(x.even, w.even, sum));
  }
};

struct Avx2F16 : Avx2 {
  using Element = Float16;
  using Operand = __m256;
  static constexpr int kChunk = 8;

  static Operand load(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Operand load_part(const Float16* from, int count) {
    return load_padded<Avx2F16>(from, count);
  }
  static void multiply_add(Sum& sum, Operand x, Operand w) { sum = _mm256_fmadd_ps(x, w, sum); }
};

}  // namespace

constinit const GemmKernels kGemmAvx2F32 = dot_kernels<Avx2F32>();
constinit const GemmKernels kGemmAvx2BF16 = dot_kernels<Avx2BF16>();
constinit const GemmKernels kGemmAvx2F16 = dot_kernels<Avx2F16>();

}  // namespace nanoflow::cpu
