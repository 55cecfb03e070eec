#include "kernels/cuda/gemm_sm90_parts.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_parts(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  switch (kernel) {
    case GemmKernel::k128x128Halves:
      return GemmSm90Parts<T, 128, 128, 2>::launch;
    case GemmKernel::k128x192Halves:
      return GemmSm90Parts<T, 128, 192, 2>::launch;
    case GemmKernel::k128x256Halves:
      return GemmSm90Parts<T, 128, 256, 2>::launch;
    case GemmKernel::k128x256Quarters:
      return GemmSm90Parts<T, 128, 256, 4>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
