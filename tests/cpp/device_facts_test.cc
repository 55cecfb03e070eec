#include "kernels/cuda/device_facts.h"

#include <doctest/doctest.h>

namespace nanoflow::cuda {
namespace {

DeviceFacts h100() {
  return {.index = 1,
          .driver = 13010,
          .runtime = 13000,
          .count_error = "",
          .count = 2,
          .name = "NVIDIA H100 80GB HBM3",
          .major = 9,
          .minor = 0,
          .sm_count = 132,
          .image_error = ""};
}

TEST_CASE("a device of the right kind has no problem") {
  CHECK(problem_of(h100()).empty());
  DeviceFacts later = h100();
  later.driver = 14000;
  CHECK(problem_of(later).empty());
}

TEST_CASE("each reason why a device cannot be used is told with what to do") {
  DeviceFacts facts = h100();
  facts.driver = 0;
  CHECK(problem_of(facts) ==
        "device 'cuda:1' needs an NVIDIA driver, and this machine has none; use device='cpu'");
  facts = h100();
  facts.driver = 12040;
  CHECK(problem_of(facts) ==
        "device 'cuda:1' needs an NVIDIA driver for CUDA 13.0, and this machine's is for CUDA "
        "12.4; update the driver or use device='cpu'");
  facts = h100();
  facts.count_error = "cudaErrorSystemNotReady (system not yet initialized)";
  CHECK(problem_of(facts) ==
        "device 'cuda:1' cannot be used: cudaErrorSystemNotReady (system not yet initialized)");
  facts = h100();
  facts.count = 1;
  CHECK(problem_of(facts) ==
        "device 'cuda:1' does not exist: CUDA shows 1 device (CUDA_VISIBLE_DEVICES selects which)");
  facts.count = 0;
  CHECK(problem_of(facts).find("CUDA shows 0 devices") != std::string::npos);
  facts = h100();
  facts.name = "NVIDIA A100-SXM4-80GB";
  facts.major = 8;
  facts.image_error = "cudaErrorNoKernelImageForDevice (no kernel image is available)";
  CHECK(problem_of(facts) ==
        "device 'cuda:1' (NVIDIA A100-SXM4-80GB, compute capability 8.0) cannot run the kernels of "
        "this build, which are for compute capability 9.0: cudaErrorNoKernelImageForDevice (no "
        "kernel image is available); use device='cpu'");
}

}  // namespace
}  // namespace nanoflow::cuda
