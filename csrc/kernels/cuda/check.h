#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

namespace nanoflow::cuda {

/// "cudaErrorIllegalAddress (an illegal memory access was encountered)"
std::string describe(cudaError_t error);

/// Throw Error with the call and the error's description. An error that a launch left for the
/// calling thread is taken away, so that the next check does not report it again.
[[noreturn]] void fail_runtime(cudaError_t error, const char* call);
[[noreturn]] void fail_driver(CUresult error, const char* call);

/// A function of the driver API as of CUDA 13.0; Error where the driver has none of that name.
void* driver_symbol(const char* name);

template <typename Function>
Function driver_function(const char* name) {
  return reinterpret_cast<Function>(driver_symbol(name));
}

}  // namespace nanoflow::cuda

/// NF_CUDA_CHECK(cudaMemcpyAsync(...)) throws Error when the call of the runtime API fails.
#define NF_CUDA_CHECK(call)                                                        \
  do {                                                                             \
    if (const cudaError_t status_ = (call); status_ != cudaSuccess) [[unlikely]] { \
      ::nanoflow::cuda::fail_runtime(status_, #call);                              \
    }                                                                              \
  } while (false)

/// NF_DRIVER_CALL(cuGreenCtxDestroy, context) calls the driver API, which the library does not link
/// (it has to load where there is no driver), and throws Error when the call fails.
#define NF_DRIVER_CALL(function, ...)                                                         \
  do {                                                                                        \
    const auto entry_ = ::nanoflow::cuda::driver_function<decltype(&function)>(#function);    \
    if (const CUresult status_ = entry_(__VA_ARGS__); status_ != CUDA_SUCCESS) [[unlikely]] { \
      ::nanoflow::cuda::fail_driver(status_, #function);                                      \
    }                                                                                         \
  } while (false)
