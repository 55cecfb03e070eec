#include "core/error.h"
#include "kernels/cpu/gemm.h"

namespace nanoflow::cpu {
namespace {

struct Row {
  Isa isa;
  const GemmKernels *f32, *bf16, *f16;
};

constexpr Row kTable[] = {
    {Isa::kGeneric, &kGemmGenericF32, &kGemmGenericBF16, &kGemmGenericF16},
    {Isa::kAvx2, &kGemmAvx2F32, &kGemmAvx2BF16, &kGemmAvx2F16},
    {Isa::kAvx512, &kGemmAvx512F32, &kGemmAvx512BF16, &kGemmAvx512F16},
    {Isa::kAvx512Bf16, &kGemmAvx512F32, &kGemmAvx512Bf16BF16, &kGemmAvx512F16},
    {Isa::kAmx, &kGemmAvx512F32, &kGemmAmxBF16, &kGemmAvx512F16},
};

}  // namespace

const GemmKernels& gemm_kernels(Isa isa, DType dtype) {
  const Row& row = kTable[static_cast<int>(isa)];
  NF_CHECK(row.isa == isa, "the GEMM table lacks instruction set ", static_cast<int>(isa));
  switch (dtype) {
    case DType::kF32:
      return *row.f32;
    case DType::kBF16:
      return *row.bf16;
    case DType::kF16:
      return *row.f16;
    default:
      fail("gemm does not support dtype ", dtype, "; use float32, bfloat16 or float16");
  }
}

}  // namespace nanoflow::cpu
