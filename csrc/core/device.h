#pragma once

#include <ostream>
#include <string_view>

namespace nanoflow {

/// Where memory lives and kernels run.
struct Device {
  enum class Kind : unsigned char {
    kCpu,   // host memory, lanes are threads
    kCuda,  // device memory, lanes are streams on a partition of the SMs
  };
  Kind kind = Kind::kCpu;
  int index = 0;

  bool operator==(const Device&) const = default;
};

/// "cpu", "cuda" or "cuda:1"; throws Error on anything else.
Device parse_device(std::string_view text);
std::ostream& operator<<(std::ostream& out, Device device);

}  // namespace nanoflow
