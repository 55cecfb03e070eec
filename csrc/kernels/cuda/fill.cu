#include "kernels/cuda/check.h"
#include "kernels/cuda/grid.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/random.h"
#include "kernels/shapes.h"

namespace nanoflow::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

/// The index of value i: `first` + i, and `gap` more for each row of `columns` before it.
struct Indices {
  uint64_t first;
  int64_t columns, gap;

  __device__ uint64_t operator()(int64_t i) const {
    return first + static_cast<uint64_t>(gap == 0 ? i : i + i / columns * gap);
  }
};

/// A thread makes packs of values; the last one may be short. Products and sums are rounded one by
/// one, as on the CPU.
template <typename T>
__global__ void fill_normal_kernel(T* out, int64_t count, Indices index, uint64_t seed, float mean,
                                   float step) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kPack;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack;
       first < count; first += stride) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const auto sum = static_cast<float>(normal_sum(seed, index(first + i)));
      pack.values[i] = from_float<T>(__fadd_rn(mean, __fmul_rn(step, sum)));
    }
    if (first + kPack <= count) {
      pack.store(out + first);
    } else {
      for (int i = 0; first + i < count; ++i) out[first + i] = pack.values[i];
    }
  }
}

}  // namespace

void CudaKernels::run(const FillNormal& op, Lane& lane) {
  check_shapes(op);
  const int64_t count = op.out.numel();
  NF_CHECK(reinterpret_cast<uintptr_t>(op.out.bytes()) % sizeof(uint4) == 0,
           "fill_normal on a GPU needs memory at a multiple of 16 bytes, not ",
           static_cast<const void*>(op.out.bytes()));
  if (count == 0) return;
  const CudaLane& own = cuda_lane(lane);
  const int64_t columns = op.out.size(op.out.dims() - 1);
  const Indices index{op.first, columns, op.stride == 0 ? 0 : op.stride - columns};
  constexpr int64_t kValuesPerBlock = kThreads * kPack;
  dispatch_half(op.out.dtype(), FillNormal::kName, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int blocks =
        grid_size((count + kValuesPerBlock - 1) / kValuesPerBlock, kBlocksPerSm, own);
    fill_normal_kernel<<<blocks, kThreads, 0, own.stream()>>>(
        op.out.data<T>(), count, index, op.seed, op.mean, op.std / kNormalSumStd);
  });
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
