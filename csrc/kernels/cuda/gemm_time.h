#pragma once

#include "kernels/cuda/gemm.h"

namespace nanoflow::cuda {

/// Microseconds of a product on the kernel that is chosen for it, at a clock that power does not
/// lower: with its whole waves of tiles, to carry what was measured to other sizes and widths.
double chosen_gemm_us(const GemmShape& shape, int sms, const GemmType& type);

}  // namespace nanoflow::cuda
