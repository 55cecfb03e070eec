#pragma once

#include <memory>
#include <vector>

#include "kernels/communicator.h"
#include "kernels/cpu/kernels.h"

namespace nanoflow::cpu {

/// Communicators of ranks 0, 1, ... of this process. Sums are taken in the order of ranks, in
/// float, and rounded once; what a row gets does not depend on the rows beside it.
std::vector<std::unique_ptr<Communicator>> make_thread_communicators(int size, Isa isa);

/// Of rank 0 of a group whose others are not there: see BackendOptions::simulated_ranks.
std::unique_ptr<Communicator> make_copy_communicator(int size);

}  // namespace nanoflow::cpu
