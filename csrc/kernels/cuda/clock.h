#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nanoflow::cuda {

/// Writes the GPU's time in nanoseconds (one clock for all SMs) to memory that the device reaches.
void launch_stamp(int64_t* ns, cudaStream_t stream);
/// Occupies one thread of one SM for that long.
void launch_delay(int64_t ns, cudaStream_t stream);
/// What loading a kernel of this library on the current device says.
cudaError_t probe_kernel_image();

}  // namespace nanoflow::cuda
