#include "kernels/cuda/grouped_gemm_sm90.cuh"

namespace nanoflow::cuda {

void grouped_gemm_bf16(const GroupedGemmArguments& arguments) {
  launch_grouped<cutlass::bfloat16_t, Combine::kStore>(arguments);
}

}  // namespace nanoflow::cuda
