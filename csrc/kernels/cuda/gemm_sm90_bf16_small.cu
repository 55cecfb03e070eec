#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_small(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  switch (kernel) {
    case GemmKernel::k64x128StreamK:
      return GemmSm90<T, T, 128, 64, 128, Alone, StreamK, Rows::kFeatures>::launch;
    case GemmKernel::k16x128StreamK:
      return GemmSm90<T, T, 128, 16, 128, Alone, StreamK, Rows::kFeatures>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
