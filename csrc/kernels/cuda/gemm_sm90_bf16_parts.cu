#include "kernels/cuda/gemm_sm90_parts.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_parts(GemmKernel kernel) {
  if (kernel != GemmKernel::k128x128Halves) return nullptr;
  return GemmSm90Parts<cutlass::bfloat16_t, 128, 128, 2>::launch;
}

}  // namespace nanoflow::cuda
