#include "kernels/cuda/gemm_sm90.h"

namespace nanoflow::cuda {

GemmLauncher gemm_launcher(GemmKernel kernel, DType x, DType out) {
  if (x == DType::kBF16 && out == DType::kBF16) {
    if (const GemmLauncher launcher = gemm_bf16_large(kernel)) return launcher;
    if (const GemmLauncher launcher = gemm_bf16_medium(kernel)) return launcher;
    return gemm_bf16_small(kernel);
  }
  if (x == DType::kBF16 && out == DType::kF32) return gemm_bf16_f32(kernel);
  if (x == DType::kF16 && (out == DType::kF16 || out == DType::kF32)) {
    if (const GemmLauncher launcher = gemm_f16_small(kernel, out)) return launcher;
    return out == DType::kF16 ? gemm_f16(kernel) : gemm_f16_f32(kernel);
  }
  return nullptr;
}

}  // namespace nanoflow::cuda
