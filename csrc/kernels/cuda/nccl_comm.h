#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/communicator.h"

namespace nanoflow::cuda {

/// Communicators of the ranks on these devices, one each and in order, by the NCCL library at
/// `library` (empty: where the system finds it).
///
/// A lane's collectives take no more CTAs than the lane has SMs: there is an NCCL communicator for
/// each width of lane, made when it is first asked for. NCCL's environment is left as it is found.
/// All ranks get the same bits from a sum, but a row's depend on where in the batch it lies, as
/// NCCL rounds after each rank, and begins with another rank in each part of the data.
///
/// A device that runs a collective waits for the other devices, and a host that blocks on that
/// device (to load a kernel, allocate, capture) may hold what their hosts need to get there. So all
/// ranks meet on the host before and after a collective that is not replayed from a graph.
std::vector<std::unique_ptr<Communicator>> make_nccl_communicators(const std::vector<int>& devices,
                                                                   const std::string& library);

}  // namespace nanoflow::cuda
