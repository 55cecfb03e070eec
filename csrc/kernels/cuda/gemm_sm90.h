#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/gemm.h"

namespace nanoflow::cuda {

/// One launch of out = x · weightᵀ + bias, or of GemmSiluMul. Strides are of rows, in elements;
/// columns are contiguous.
struct GemmArguments {
  const void* x;       // [T, K]
  const void* weight;  // [N, K]
  const void* bias;    // [N] of out's dtype, or null
  void* out;           // [T, N], of GemmSiluMul [T, N / 2]
  GemmShape shape;
  int64_t x_stride, weight_stride, out_stride;
  bool accumulate;  // out += instead of out =
  bool is_gelu;     // GemmSiluMul with GELU
  int sms;          // CTAs that run at a time
  void* workspace;  // stream-K sums and flags, contents undefined
  size_t workspace_bytes;
  cudaStream_t stream;
};

/// Enqueues the kernel; Error when the kernel cannot run these arguments.
using GemmLauncher = void (*)(const GemmArguments&);

/// The kernel for a type of product, or null where there is none.
GemmLauncher gemm_launcher(GemmKernel kernel, const GemmType& type);

/// The launchers by translation unit (each file instantiates up to four kernels, which takes a
/// compiler 2 to 4 GB); null for kernels of another one.
GemmLauncher gemm_bf16_large(GemmKernel kernel);
GemmLauncher gemm_bf16_columns(GemmKernel kernel);
GemmLauncher gemm_bf16_medium(GemmKernel kernel);
GemmLauncher gemm_bf16_odd(GemmKernel kernel);
GemmLauncher gemm_bf16_small(GemmKernel kernel);
GemmLauncher gemm_bf16_parts(GemmKernel kernel);
GemmLauncher gemm_bf16_f32(GemmKernel kernel);
GemmLauncher gemm_bf16_silu_mul(GemmKernel kernel);
GemmLauncher gemm_f16(GemmKernel kernel);
GemmLauncher gemm_f16_f32(GemmKernel kernel);
GemmLauncher gemm_f16_silu_mul(GemmKernel kernel);

}  // namespace nanoflow::cuda
