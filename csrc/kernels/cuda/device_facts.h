#pragma once

#include <string>

// What decides whether a device can be used, and the sentence for each reason why not: plain C++,
// tested without CUDA.

namespace nanoflow::cuda {

/// What the driver and the runtime say, as far as they got. Versions are 13000 for 13.0.
struct DeviceFacts {
  int index = 0;
  int driver = 0;           // newest CUDA that the driver runs; 0: there is no driver
  int runtime = 0;          // the CUDA of this build
  std::string count_error;  // why devices could not be counted
  int count = 0;
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int sm_count = 0;
  std::string image_error;  // why a kernel of this build could not be loaded
};

/// Whether the driver runs programs of this build's CUDA: minor versions do not matter.
bool has_driver(const DeviceFacts& facts);
/// What is missing and what to do about it, empty when nothing is.
std::string problem_of(const DeviceFacts& facts);

}  // namespace nanoflow::cuda
