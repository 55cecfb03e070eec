#pragma once

#include "kernels/cpu/math_avx512_base.h"

// AVX-512 with bfloat16 instructions, which take denormal numbers for 0.

namespace nanoflow::cpu {
namespace {

inline __m256i to_bf16(Vec x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

}  // namespace
}  // namespace nanoflow::cpu
