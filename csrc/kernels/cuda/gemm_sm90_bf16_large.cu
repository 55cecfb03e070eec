#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_large(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  switch (kernel) {
    case GemmKernel::k128x256:
      return GemmSm90<T, T, 128, 256, 64, PairOfRows, Cooperative>::launch;
    case GemmKernel::k128x192:
      return GemmSm90<T, T, 128, 192, 64, PairOfRows, Cooperative>::launch;
    case GemmKernel::k128x256StreamK:
      return GemmSm90<T, T, 128, 256, 64, PairOfRows, StreamK>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
