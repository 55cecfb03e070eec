#pragma once

#include <memory>

#include "kernels/communicator.h"

namespace nanoflow::cuda {

/// Of a rank alone (size 1), whose sums are what they are and whose gathers are copies; or of rank
/// 0 of a group whose others are not there, see BackendOptions::simulated_ranks. Then a sum reads
/// and writes its data twice, as much as a ring sends and receives.
std::unique_ptr<Communicator> make_copy_communicator(int size);

}  // namespace nanoflow::cuda
