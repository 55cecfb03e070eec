#include "kernels/cuda/check.h"
#include "kernels/cuda/clock.h"

namespace nanoflow::cuda {
namespace {

constexpr unsigned kNapNs = 500;

__device__ int64_t device_time() {
  int64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

__global__ void stamp_kernel(int64_t* ns) { *ns = device_time(); }

__global__ void delay_kernel(int64_t ns) {
  const int64_t end = device_time() + ns;
  while (device_time() < end) __nanosleep(kNapNs);
}

}  // namespace

void launch_stamp(int64_t* ns, cudaStream_t stream) {
  stamp_kernel<<<1, 1, 0, stream>>>(ns);
  NF_CUDA_CHECK(cudaGetLastError());
}

void launch_delay(int64_t ns, cudaStream_t stream) {
  delay_kernel<<<1, 1, 0, stream>>>(ns);
  NF_CUDA_CHECK(cudaGetLastError());
}

cudaError_t probe_kernel_image() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, stamp_kernel);
  cudaGetLastError();
  return status;
}

}  // namespace nanoflow::cuda
