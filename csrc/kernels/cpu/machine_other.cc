#include "kernels/cpu/gate.h"
#include "kernels/cpu/isa.h"

namespace nanoflow::cpu {

std::vector<Isa> supported_isas() { return {Isa::kGeneric}; }

void relax() {}

}  // namespace nanoflow::cpu
