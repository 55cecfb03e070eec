#include "kernels/cpu/math_loops.h"

namespace nanoflow::cpu {

const LoopSet& loop_set(Isa) { return kLoopsGeneric; }

}  // namespace nanoflow::cpu
