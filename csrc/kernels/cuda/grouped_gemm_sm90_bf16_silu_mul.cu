#include "kernels/cuda/grouped_gemm_sm90.cuh"

namespace nanoflow::cuda {

void grouped_gemm_bf16_silu_mul(const GroupedGemmArguments& arguments) {
  launch_grouped<cutlass::bfloat16_t, Combine::kSiluMul>(arguments);
}

}  // namespace nanoflow::cuda
