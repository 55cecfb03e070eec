#pragma once

#include <string_view>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace nanoflow::cpu {

/// "generic", "avx2", "avx512", "avx512_bf16" or "amx".
std::string_view to_string(Isa isa);

/// What this machine and its operating system can run, slowest first; never empty. Where the system
/// has to be asked for the use of an instruction set (AMX on Linux), this asks, for the whole
/// process.
std::vector<Isa> supported_isas();

/// BackendOptions::isa; "auto" is the fastest supported. Error for what is unknown or not
/// supported.
Isa parse_isa(std::string_view name);

}  // namespace nanoflow::cpu
