#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace nanoflow::cuda {

/// Throw Error with the error's name and description. A launch error is taken off the thread's last
/// error, so that the next check does not report it again.
[[noreturn]] void fail_runtime(cudaError_t error, const char* call);
[[noreturn]] void fail_driver(CUresult error, const char* call);

}  // namespace nanoflow::cuda

/// NF_CUDA_CHECK(cudaMemcpyAsync(...)) throws Error when the call of the runtime API fails.
#define NF_CUDA_CHECK(call)                                                        \
  do {                                                                             \
    if (const cudaError_t status_ = (call); status_ != cudaSuccess) [[unlikely]] { \
      ::nanoflow::cuda::fail_runtime(status_, #call);                              \
    }                                                                              \
  } while (false)

/// The same for the driver API.
#define NF_CU_CHECK(call)                                                        \
  do {                                                                           \
    if (const CUresult status_ = (call); status_ != CUDA_SUCCESS) [[unlikely]] { \
      ::nanoflow::cuda::fail_driver(status_, #call);                             \
    }                                                                            \
  } while (false)
