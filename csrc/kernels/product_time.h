#pragma once

// What matrix products take on devices that need not be there.

namespace nanoflow {

/// Microseconds of x[rows, depth] · weight[features, depth]ᵀ on so many SMs of a GPU, on the kernel
/// that is chosen for it, at a clock that power does not lower: with its whole waves of tiles, to
/// carry what was measured to other sizes and widths. `is_general`: other than bfloat16 into
/// bfloat16, or with an activation. Throws Error unless all sizes are positive.
double cuda_gemm_us(int rows, int features, int depth, int sms, bool is_general);

}  // namespace nanoflow
