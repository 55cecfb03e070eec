#include "core/error.h"
#include "kernels/cpu/math_loops.h"

namespace nanoflow::cpu {

const LoopSet& loop_set(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return kLoopsGeneric;
    case Isa::kAvx2:
      return kLoopsAvx2;
    case Isa::kAvx512:
      return kLoopsAvx512;
    case Isa::kAvx512Bf16:
      return kLoopsAvx512Bf16;
    case Isa::kAmx:
      return kLoopsAmx;
  }
  fail("unknown instruction set ", static_cast<int>(isa));
}

}  // namespace nanoflow::cpu
