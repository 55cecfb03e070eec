#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // products of 160 columns; a large header
#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_odd(GemmKernel kernel) {
  using T = cutlass::bfloat16_t;
  if (kernel != GemmKernel::k128x160) return nullptr;
  return GemmSm90<T, T, 128, 160, 64, PairOfRows, Cooperative>::launch;
}

}  // namespace nanoflow::cuda
