#include "kernels/cuda/gemm_sm90.h"

namespace nanoflow::cuda {

GemmLauncher gemm_launcher(GemmKernel kernel, const GemmType& type) {
  const bool is_same = type.out == type.x, is_f32 = type.out == DType::kF32;
  if (type.x == DType::kBF16 && is_same) {
    if (type.is_silu_mul) return gemm_bf16_silu_mul(kernel);
    if (const GemmLauncher launcher = gemm_bf16_large(kernel)) return launcher;
    if (const GemmLauncher launcher = gemm_bf16_columns(kernel)) return launcher;
    if (const GemmLauncher launcher = gemm_bf16_medium(kernel)) return launcher;
    if (const GemmLauncher launcher = gemm_bf16_odd(kernel)) return launcher;
    if (const GemmLauncher launcher = gemm_bf16_small(kernel)) return launcher;
    return gemm_bf16_parts(kernel);
  }
  if (type.x == DType::kF16 && is_same) {
    return type.is_silu_mul ? gemm_f16_silu_mul(kernel) : gemm_f16(kernel);
  }
  if (type.x == DType::kBF16 && is_f32) return gemm_bf16_f32(kernel);
  if (type.x == DType::kF16 && is_f32) return gemm_f16_f32(kernel);
  return nullptr;
}

}  // namespace nanoflow::cuda
