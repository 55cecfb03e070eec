#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_columns(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  switch (kernel) {
    case GemmKernel::k128x256Columns:
      return GemmSm90<T, T, 128, 256, 64, PairOfColumns, Cooperative>::launch;
    case GemmKernel::k128x192Columns:
      return GemmSm90<T, T, 128, 192, 64, PairOfColumns, Cooperative>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
