#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_medium(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  switch (kernel) {
    case GemmKernel::k128x128:
      return GemmSm90<T, T, 128, 128, 64, Alone, Pingpong>::launch;
    case GemmKernel::k128x128StreamK:
      return GemmSm90<T, T, 128, 128, 64, PairOfRows, StreamK>::launch;
    case GemmKernel::k128x64:
      return GemmSm90<T, T, 128, 64, 64, PairOfColumns, Cooperative>::launch;
    case GemmKernel::k128x96Pair:
      return GemmSm90<T, T, 128, 96, 64, PairOfRows, Cooperative>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
