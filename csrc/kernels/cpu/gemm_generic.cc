#include <cstring>

#include "kernels/cpu/math_generic.h"
// What is written against it:
#include "kernels/cpu/gemm_dot.h"

// Vectors of four, which compilers know on every machine.

namespace nanoflow::cpu {
namespace {

typedef uint32_t Uint4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

Uint4 load_half4(const void* from) {
  Half4 bits;
  std::memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, Uint4);
}

struct Generic {
  using Sum = Vec;
  using Operand = Vec;
  static constexpr int kRows = 2, kColumns = 4, kChunk = 4;

  static void multiply_add(Sum& sum, Operand x, Operand w) { sum += x * w; }

  static void reduce(const Sum* sums, float* out) {
    for (int i = 0; i < kRows * kColumns; ++i) {
      out[i] = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
    }
  }
};

template <typename Simd, typename Element>
Vec load_padded(const Element* from, int count) {
  Element padded[Generic::kChunk] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(Element));
  return Simd::load(padded);
}

struct GenericF32 : Generic {
  using Element = float;
  static Operand load(const float* from) {
    Vec values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static Operand load_part(const float* from, int count) {
    return load_padded<GenericF32>(from, count);
  }
};

struct GenericBF16 : Generic {
  using Element = BFloat16;
  static Operand load(const BFloat16* from) {
    return reinterpret_cast<Vec>(load_half4(from) << 16);
  }
  static Operand load_part(const BFloat16* from, int count) {
    return load_padded<GenericBF16>(from, count);
  }
};

struct GenericF16 : Generic {
  using Element = Float16;
  static Operand load(const Float16* from) {
    const Uint4 bits = load_half4(from);
    const Uint4 magnitude = (bits & 0x7fff) << 13;
    // The exponent moves from a bias of 15 to one of 127; subnormals become normal on the way.
    const Vec scaled = reinterpret_cast<Vec>(magnitude) * 0x1p112f;
    const Uint4 is_special = reinterpret_cast<Uint4>(magnitude >= (0x1fu << 23));  // Inf and NaN
    return reinterpret_cast<Vec>(reinterpret_cast<Uint4>(scaled) | (is_special & 0x7f800000) |
                                 ((bits & 0x8000) << 16));
  }
  static Operand load_part(const Float16* from, int count) {
    return load_padded<GenericF16>(from, count);
  }
};

}  // namespace

constinit const GemmKernels kGemmGenericF32 = dot_kernels<GenericF32>();
constinit const GemmKernels kGemmGenericBF16 = dot_kernels<GenericBF16>();
constinit const GemmKernels kGemmGenericF16 = dot_kernels<GenericF16>();

}  // namespace nanoflow::cpu
