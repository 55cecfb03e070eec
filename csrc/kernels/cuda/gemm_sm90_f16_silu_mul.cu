#include "kernels/cuda/gemm_sm90_silu_mul.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_f16_silu_mul(GemmKernel kernel) {
  return silu_mul_launcher<cutlass::half_t>(kernel);
}

}  // namespace nanoflow::cuda
