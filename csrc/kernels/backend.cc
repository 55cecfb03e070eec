#include "kernels/backend.h"

#include "core/error.h"

namespace nanoflow {

std::vector<std::unique_ptr<Lane>> Backend::make_lanes(const std::vector<int>& widths) {
  std::vector<std::unique_ptr<Lane>> lanes;
  for (int width : widths) lanes.push_back(make_lane(width));
  return lanes;
}

std::shared_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device.kind == Device::Kind::kCpu) return make_cpu_backend(options);
  fail("device '", options.device,
       "' needs nanoflow's CUDA backend, which this build does not contain; use device='cpu'");
}

}  // namespace nanoflow
