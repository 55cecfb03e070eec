#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

GemmLauncher gemm_f16(GemmKernel kernel) {
  using T = cutlass::half_t;
  switch (kernel) {
    case GemmKernel::k128x256:
      return GemmSm90<T, T, 128, 256, 64, PairOfRows, Cooperative>::launch;
    case GemmKernel::k128x128:
      return GemmSm90<T, T, 128, 128, 64, Alone, Pingpong>::launch;
    case GemmKernel::k64x128StreamK:
      return GemmSm90<T, T, 128, 64, 128, Alone, StreamK, Rows::kFeatures>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
