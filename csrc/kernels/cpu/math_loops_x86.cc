#include "kernels/cpu/math_loops.h"

namespace nanoflow::cpu {

const LoopSet& loop_set(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return kLoopsGeneric;
    case Isa::kAvx2:
      return kLoopsAvx2;
    default:
      return kLoopsAvx512;
  }
}

}  // namespace nanoflow::cpu
