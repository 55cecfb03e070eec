#pragma once

#include "kernels/cuda/gemm_sm90.cuh"

namespace nanoflow::cuda {

/// The kernels of GemmSiluMul for operands and results of T; null for others.
template <class T>
GemmLauncher silu_mul_launcher(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::k128x256:
      return GemmSm90<T, T, 128, 256, 64, PairOfRows, Cooperative, Rows::kTokens,
                      Combine::kSiluMul>::launch;
    case GemmKernel::k128x128:
      return GemmSm90<T, T, 128, 128, 64, Alone, Pingpong, Rows::kTokens,
                      Combine::kSiluMul>::launch;
    case GemmKernel::k64x128StreamK:
      return GemmSm90<T, T, 128, 64, 128, Alone, StreamK, Rows::kFeatures,
                      Combine::kSiluMul>::launch;
    default:
      return nullptr;
  }
}

}  // namespace nanoflow::cuda
