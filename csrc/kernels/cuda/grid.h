#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/lane.h"

namespace nanoflow::cuda {

/// Blocks of a kernel that loops over `blocks` blocks' work: no more than run at once on the lane.
inline int grid_size(int64_t blocks, int blocks_per_sm, const CudaLane& lane) {
  return static_cast<int>(std::min<int64_t>(blocks, int64_t{lane.width()} * blocks_per_sm));
}

}  // namespace nanoflow::cuda
