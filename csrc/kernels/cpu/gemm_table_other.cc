#include "core/error.h"
#include "kernels/cpu/gemm.h"

namespace nanoflow::cpu {

const GemmKernels& gemm_kernels(Isa, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return kGemmGenericF32;
    case DType::kBF16:
      return kGemmGenericBF16;
    case DType::kF16:
      return kGemmGenericF16;
    default:
      fail("gemm does not support dtype ", dtype, "; use float32, bfloat16 or float16");
  }
}

}  // namespace nanoflow::cpu
