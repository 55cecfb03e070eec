#include "kernels/cuda/gemm_sm90_beside.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_beside(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  switch (kernel) {
    case GemmKernel::k128x256Beside:
      return GemmSm90Beside<T, 256, 3, Combine::kStore>::launch;
    case GemmKernel::k128x192Beside:
      return GemmSm90Beside<T, 192, 3, Combine::kStore>::launch;
    case GemmKernel::k128x128Beside:
      return GemmSm90Beside<T, 128, 4, Combine::kStore>::launch;
    default:
      return nullptr;
  }
}

GemmLauncher gemm_bf16_beside_silu_mul(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  switch (kernel) {
    case GemmKernel::k128x256Beside:
      return GemmSm90Beside<T, 256, 3, Combine::kSiluMul>::launch;
    case GemmKernel::k128x192Beside:
      return GemmSm90Beside<T, 192, 3, Combine::kSiluMul>::launch;
    case GemmKernel::k128x128Beside:
      return GemmSm90Beside<T, 128, 4, Combine::kSiluMul>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
