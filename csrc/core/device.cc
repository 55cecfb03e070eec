#include "core/device.h"

#include <charconv>

#include "core/error.h"

namespace nanoflow {

Device parse_device(std::string_view text) {
  const size_t colon = text.find(':');
  const std::string_view kind = text.substr(0, colon);
  Device device;
  if (kind == "cuda") {
    device.kind = Device::Kind::kCuda;
  } else {
    NF_CHECK(kind == "cpu", "unknown device '", text, "'; use cpu, cuda or cuda:N");
  }
  if (colon != std::string_view::npos) {
    const std::string_view number = text.substr(colon + 1);
    const char* end = number.data() + number.size();
    const auto [parsed, code] = std::from_chars(number.data(), end, device.index);
    NF_CHECK(code == std::errc() && parsed == end && device.index >= 0, "device '", text,
             "' has no valid index after ':'; use for example cuda:0");
  }
  return device;
}

std::ostream& operator<<(std::ostream& out, Device device) {
  out << (device.kind == Device::Kind::kCpu ? "cpu" : "cuda");
  if (device.kind == Device::Kind::kCuda) out << ":" << device.index;
  return out;
}

}  // namespace nanoflow
