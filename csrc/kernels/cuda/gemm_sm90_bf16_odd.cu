#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // products of such widths; a large header
#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_odd(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  switch (kernel) {
    case GemmKernel::k128x160:
      return GemmSm90<T, T, 128, 160, 64, PairOfRows, Cooperative>::launch;
    case GemmKernel::k128x160Columns:
      return GemmSm90<T, T, 128, 160, 64, PairOfColumns, Cooperative>::launch;
    case GemmKernel::k128x144:
      return GemmSm90<T, T, 128, 144, 64, PairOfRows, Cooperative>::launch;
    case GemmKernel::k128x224:
      return GemmSm90<T, T, 128, 224, 64, PairOfRows, Cooperative>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
