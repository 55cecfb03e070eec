#pragma once

#include <cstdint>

#include "kernels/cuda/gemm_sm90.h"

namespace nanoflow::cuda {

/// One launch of GroupedGemm or GroupedGemmSiluMul.
struct GroupedGemmArguments {
  GemmArguments all;       // shape.rows: of all experts; weight: of the first one; nothing added
  const int32_t* offsets;  // [experts + 1], device memory
  int experts;
  int64_t expert_stride;  // of weight, in elements
  bool batch_invariant;   // the tiles are the same whatever the rows
};

/// Enqueues the kernel; Error when the kernel cannot run these arguments.
using GroupedGemmLauncher = void (*)(const GroupedGemmArguments&);

/// By translation unit. They choose their tiles by the rows of an average expert.
void grouped_gemm_bf16(const GroupedGemmArguments& arguments);
void grouped_gemm_bf16_silu_mul(const GroupedGemmArguments& arguments);
void grouped_gemm_f16(const GroupedGemmArguments& arguments);
void grouped_gemm_f16_silu_mul(const GroupedGemmArguments& arguments);

}  // namespace nanoflow::cuda
