#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/cuda/check.h"

namespace nanoflow::cuda {

struct LaunchShape {
  int grid;
  int threads;  // of a CTA
  size_t shared_bytes = 0;
  int cluster = 1;  // CTAs
  cudaStream_t stream = nullptr;
};

/// Launches a kernel that may have to run beside others on the same SMs. An SM in use takes only
/// CTAs of kernels that want it divided in the same way between shared memory and cache: so all of
/// these want as much shared memory as there is.
template <class... Parameters, class... Arguments>
void launch_beside(void (*kernel)(Parameters...), const LaunchShape& shape,
                   const Arguments&... arguments) {
  const auto function = reinterpret_cast<const void*>(kernel);
  NF_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
  NF_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shape.shared_bytes)));
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[0].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 2 : 1;
  NF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace nanoflow::cuda
