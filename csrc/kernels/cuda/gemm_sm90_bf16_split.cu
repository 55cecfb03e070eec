#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_split(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  switch (kernel) {
    case GemmKernel::k128x128Split2:
      return GemmSm90<T, T, 128, 128, 64, Alone, SplitK<2>>::launch;
    case GemmKernel::k256x128Split4:
      return GemmSm90<T, T, 256, 128, 64, Alone, SplitK<4>>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
