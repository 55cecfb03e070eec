#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_f16_small(GemmKernel kernel, DType out) {
  using T = cutlass::half_t;
  if (kernel != GemmKernel::k64x128StreamK) return nullptr;
  return out == DType::kF32
             ? GemmSm90<T, float, 128, 64, 128, Alone, StreamK, Rows::kFeatures>::launch
             : GemmSm90<T, T, 128, 64, 128, Alone, StreamK, Rows::kFeatures>::launch;
}

}  // namespace nanoflow::cuda
