#pragma once

#include <memory>

#include "kernels/communicator.h"

namespace nanoflow::cuda {

/// Of a rank alone: sums are what they are, and a gather is a copy.
std::unique_ptr<Communicator> make_local_communicator();

}  // namespace nanoflow::cuda
