#include "kernels/cuda/grouped_gemm_sm90.cuh"

namespace nanoflow::cuda {

void grouped_gemm_f16(const GroupedGemmArguments& arguments) {
  launch_grouped<cutlass::half_t, Combine::kStore>(arguments);
}

}  // namespace nanoflow::cuda
