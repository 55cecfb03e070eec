#include "kernels/cuda/device.h"

#include <cuda_runtime_api.h>

#include "core/device.h"
#include "core/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/clock.h"

namespace nanoflow::cuda {
namespace {

struct Version {
  int number;  // 13000 for 13.0
};

std::ostream& operator<<(std::ostream& out, Version version) {
  return out << version.number / 1000 << '.' << version.number % 1000 / 10;
}

void check_driver(Device device) {
  Version driver{0}, runtime{0};
  NF_CUDA_CHECK(cudaDriverGetVersion(&driver.number));
  NF_CUDA_CHECK(cudaRuntimeGetVersion(&runtime.number));
  NF_CHECK(driver.number != 0, "device '", device,
           "' needs an NVIDIA driver, and this machine has none; use device='cpu'");
  NF_CHECK(driver.number / 1000 >= runtime.number / 1000, "device '", device,
           "' needs an NVIDIA driver for CUDA ", runtime, ", and this machine's is for CUDA ",
           driver, "; update the driver or use device='cpu'");
}

}  // namespace

DeviceInfo open_device(int index) {
  const Device device{Device::Kind::kCuda, index};
  check_driver(device);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  NF_CHECK(status == cudaSuccess || status == cudaErrorNoDevice, "device '", device,
           "' cannot be used: ", describe(status));
  NF_CHECK(index < count, "device '", device, "' does not exist: CUDA shows ", count,
           count == 1 ? " device" : " devices", " (CUDA_VISIBLE_DEVICES selects which)");
  cudaDeviceProp properties;
  NF_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  NF_CUDA_CHECK(cudaSetDevice(index));
  const cudaError_t image = probe_kernel_image();
  NF_CHECK(image == cudaSuccess, "device '", device, "' (", properties.name,
           ", compute capability ", properties.major, ".", properties.minor,
           ") cannot run the kernels of this build: ", describe(image),
           "; they are for compute capability 9.0");
  return {.index = index,
          .sm_count = properties.multiProcessorCount,
          .compute_capability = properties.major * 10 + properties.minor,
          .name = properties.name};
}

}  // namespace nanoflow::cuda
