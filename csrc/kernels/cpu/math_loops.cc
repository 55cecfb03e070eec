#include "kernels/cpu/math_loops.h"

#include "core/error.h"

namespace nanoflow::cpu {

const Loops& LoopSet::of(DType dtype, std::string_view op) const {
  switch (dtype) {
    case DType::kF32:
      return f32;
    case DType::kBF16:
      return bf16;
    case DType::kF16:
      return f16;
    default:
      fail(op, " does not support dtype ", dtype, "; use float32, bfloat16 or float16");
  }
}

}  // namespace nanoflow::cpu
