#pragma once

#include <string>

namespace nanoflow::cuda {

/// What kernels need to know of a GPU; read once, when the backend is made.
struct DeviceInfo {
  int index = 0;
  int sm_count = 0;
  int compute_capability = 0;  // 90 for 9.0
  std::string name;
};

/// Makes the device current and reads its properties. Throws Error that says what is missing: a
/// driver, a newer one, the device, or kernels for its architecture.
DeviceInfo open_device(int index);

}  // namespace nanoflow::cuda
