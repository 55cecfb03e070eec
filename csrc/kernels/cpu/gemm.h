#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/lane.h"

namespace nanoflow::cpu {

/// Gemm, or GemmSiluMul with N rows of gate and up. Strides are elements from row to row.
struct GemmArgs {
  const void* x;       // [T, K]
  const void* weight;  // [N, K]
  const void* bias;    // [N] of out's dtype, or null
  void* out;           // [T, N], or [T, N / 2]
  int64_t T, N, K;
  int64_t x_stride, weight_stride, out_stride;
  bool accumulate;
  Activation activation;  // of GemmSiluMul
};

/// One way to multiply. All threads of a lane call run(). In every kernel the order in which the
/// products of one element of out are summed depends on K alone, so a row is the same whichever
/// rows share the call and however threads share the work: K is never split among threads, and
/// tiles at the edges sum like all others.
struct GemmKernel {
  void (*run)(const GemmArgs& args, const Worker& worker);
  /// Scratch of the lane that run() needs.
  size_t (*scratch_bytes)(const GemmArgs& args, int width);
};

/// For one dtype of x and weight: Gemm with out of that dtype or of float32, and GemmSiluMul.
struct GemmKernels {
  GemmKernel same, f32, silu_mul;
};

// One line for each file compiled for an instruction set.
extern const GemmKernels kGemmGenericF32, kGemmGenericBF16, kGemmGenericF16;
extern const GemmKernels kGemmAvx2F32, kGemmAvx2BF16, kGemmAvx2F16;
extern const GemmKernels kGemmAvx512F32, kGemmAvx512BF16, kGemmAvx512F16;
extern const GemmKernels kGemmAvx512Bf16BF16;
extern const GemmKernels kGemmAmxBF16;

/// The fastest kernels of an instruction set for a floating dtype.
const GemmKernels& gemm_kernels(Isa isa, DType dtype);

}  // namespace nanoflow::cpu
