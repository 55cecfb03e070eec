#pragma once

#include <cstdint>

#include "core/tensor.h"
#include "kernels/cuda/lane.h"

namespace nanoflow::cuda {

/// Matrices of `columns` columns each, in device memory, that are taken side by side.
struct ColumnParts {
  const void* data;
  int64_t columns;
  int64_t row_stride;   // values
  int64_t part_stride;  // values from a matrix to the next
};

/// out[t][j] = row t, column j of the parts side by side.
void place_columns(const ColumnParts& parts, const Tensor& out, CudaLane& lane);

}  // namespace nanoflow::cuda
