#include "kernels/cuda/device_facts.h"

#include <ostream>
#include <sstream>

namespace nanoflow::cuda {
namespace {

struct Version {
  int number;
};

std::ostream& operator<<(std::ostream& out, Version version) {
  return out << version.number / 1000 << '.' << version.number % 1000 / 10;
}

}  // namespace

bool has_driver(const DeviceFacts& facts) { return facts.driver / 1000 >= facts.runtime / 1000; }

std::string problem_of(const DeviceFacts& facts) {
  std::ostringstream text;
  text << "device 'cuda:" << facts.index << "' ";
  if (facts.driver == 0) {
    text << "needs an NVIDIA driver, and this machine has none; use device='cpu'";
  } else if (!has_driver(facts)) {
    text << "needs an NVIDIA driver for CUDA " << Version{facts.runtime}
         << ", and this machine's is for CUDA " << Version{facts.driver}
         << "; update the driver or use device='cpu'";
  } else if (!facts.count_error.empty()) {
    text << "cannot be used: " << facts.count_error;
  } else if (facts.index >= facts.count) {
    text << "does not exist: CUDA shows " << facts.count
         << (facts.count == 1 ? " device" : " devices") << " (CUDA_VISIBLE_DEVICES selects which)";
  } else if (!facts.image_error.empty()) {
    text << "(" << facts.name << ", compute capability " << facts.major << '.' << facts.minor
         << ") cannot run the kernels of this build, which are for compute capability 9.0: "
         << facts.image_error << "; use device='cpu'";
  } else {
    return "";
  }
  return text.str();
}

}  // namespace nanoflow::cuda
