#include "kernels/cuda/check.h"

#include "core/error.h"

namespace nanoflow::cuda {
namespace {

constexpr unsigned kDriverApi = 13000;  // CUDA 13.0

}  // namespace

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

void fail_runtime(cudaError_t error, const char* call) {
  cudaGetLastError();
  if (error == cudaErrorMemoryAllocation) {
    fail<OutOfMemory>("CUDA: ", call, " failed: ", describe(error),
                      "; lower gpu_memory_utilization to leave more memory to it");
  }
  fail("CUDA: ", call, " failed: ", describe(error));
}

void fail_driver(CUresult error, const char* call) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver_function<decltype(&cuGetErrorName)>("cuGetErrorName")(error, &name);
  driver_function<decltype(&cuGetErrorString)>("cuGetErrorString")(error, &text);
  fail("CUDA: ", call, " failed: ", name == nullptr ? "unknown error" : name, " (",
       text == nullptr ? "" : text, ")");
}

void* driver_symbol(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  NF_CUDA_CHECK(
      cudaGetDriverEntryPointByVersion(name, &function, kDriverApi, cudaEnableDefault, &result));
  NF_CHECK(result == cudaDriverEntryPointSuccess && function != nullptr,
           "the NVIDIA driver has no ", name, "; it needs to be one for CUDA 13.0 (580) or newer");
  return function;
}

}  // namespace nanoflow::cuda
