#include "kernels/cuda/gemm_sm90_silu_mul.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_bf16_silu_mul(GemmKernel kernel) {
  return silu_mul_launcher<cutlass::bfloat16_t>(kernel);
}

}  // namespace nanoflow::cuda
