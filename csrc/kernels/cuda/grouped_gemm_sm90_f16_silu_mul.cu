#include "kernels/cuda/grouped_gemm_sm90.cuh"

namespace nanoflow::cuda {

void grouped_gemm_f16_silu_mul(const GroupedGemmArguments& arguments) {
  launch_grouped<cutlass::half_t, Combine::kSiluMul>(arguments);
}

}  // namespace nanoflow::cuda
