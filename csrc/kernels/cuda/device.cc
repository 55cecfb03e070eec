#include "kernels/cuda/device.h"

#include <cuda_runtime_api.h>

#include <array>

#include "core/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/clock.h"

namespace nanoflow::cuda {

DeviceFacts probe_device(int index) {
  DeviceFacts facts;
  facts.index = index;
  cudaRuntimeGetVersion(&facts.runtime);
  if (cudaDriverGetVersion(&facts.driver) != cudaSuccess) facts.driver = 0;
  if (!has_driver(facts)) return facts;
  const cudaError_t counted = cudaGetDeviceCount(&facts.count);
  if (counted != cudaSuccess) {
    cudaGetLastError();
    facts.count = 0;
    if (counted != cudaErrorNoDevice) facts.count_error = describe(counted);
  }
  if (index >= facts.count) return facts;
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status == cudaSuccess) {
    facts.name = properties.name;
    facts.major = properties.major;
    facts.minor = properties.minor;
    facts.sm_count = properties.multiProcessorCount;
    status = cudaSetDevice(index);
  }
  if (status == cudaSuccess) {
    const cudaError_t image = probe_kernel_image();
    if (image != cudaSuccess) facts.image_error = describe(image);
  } else {  // the device is busy, or broken
    cudaGetLastError();
    facts.count_error = describe(status);
  }
  return facts;
}

DeviceInfo open_device(int index) {
  const DeviceFacts facts = probe_device(index);
  const std::string problem = problem_of(facts);
  NF_CHECK(problem.empty(), problem);
  return {.index = index,
          .sm_count = facts.sm_count,
          .compute_capability = facts.major * 10 + facts.minor,
          .name = facts.name};
}

std::string bus_id_of(int index) {
  std::array<char, 32> id{};
  NF_CUDA_CHECK(cudaDeviceGetPCIBusId(id.data(), static_cast<int>(id.size()), index));
  return id.data();
}

DeviceMemory memory_of(int index) {
  DeviceMemory memory{};
  NF_CUDA_CHECK(cudaSetDevice(index));
  NF_CUDA_CHECK(cudaMemGetInfo(&memory.free, &memory.total));
  return memory;
}

}  // namespace nanoflow::cuda
