#include "kernels/cpu/isa.h"

#include <algorithm>
#include <string>

#include "core/error.h"
#include "kernels/backend.h"

namespace nanoflow::cpu {

std::string_view to_string(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return "generic";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  fail("unknown instruction set ", static_cast<int>(isa));
}

Isa parse_isa(std::string_view name) {
  const std::vector<Isa> isas = supported_isas();
  if (name == "auto") return isas.back();
  const auto found =
      std::find_if(isas.begin(), isas.end(), [&](Isa isa) { return to_string(isa) == name; });
  if (found != isas.end()) return *found;
  std::string known;
  for (Isa isa : isas) known += std::string(", ") + std::string(to_string(isa));
  fail("instruction set '", name, "' is not one of those this machine has: auto", known);
}

}  // namespace nanoflow::cpu

namespace nanoflow {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (cpu::Isa isa : cpu::supported_isas()) names.emplace_back(cpu::to_string(isa));
  return names;
}

}  // namespace nanoflow
