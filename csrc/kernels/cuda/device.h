#pragma once

#include <cstddef>
#include <string>

#include "kernels/cuda/device_facts.h"

namespace nanoflow::cuda {

/// What kernels need to know of a GPU; read once, when the backend is made.
struct DeviceInfo {
  int index = 0;
  int sm_count = 0;
  int compute_capability = 0;  // 90 for 9.0
  std::string name;
};

/// Finds out whether a device can be used, from the driver up to a kernel of this library; makes it
/// current. Never throws, and stops where the first thing is missing.
DeviceFacts probe_device(int index);

/// Makes the device current and reads its properties. Throws Error with the problem that it has.
DeviceInfo open_device(int index);

/// As in "0000:3B:00.0": it names the board to other libraries, whatever devices CUDA shows. Throws
/// Error where there is no such device.
std::string bus_id_of(int index);

struct DeviceMemory {
  size_t free, total;  // bytes
};

DeviceMemory memory_of(int index);

}  // namespace nanoflow::cuda
