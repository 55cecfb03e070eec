#include "kernels/cuda/attention_kernel.cuh"

namespace nanoflow::cuda {

void launch_attention_d256(const AttentionArguments& arguments, DType dtype) {
  if (dtype == DType::kBF16) {
    launch_attention<__nv_bfloat16, 256>(arguments);
  } else {
    launch_attention<__half, 256>(arguments);
  }
}

}  // namespace nanoflow::cuda
