#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/grid.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/shapes.h"

// RMS norms: a block takes a row at a time and keeps it in registers, so that each value is read
// and written once. A row's result does not depend on the other rows.

namespace nanoflow::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kFewThreads = 128;
constexpr int kMostPacks = 16;  // of a thread
/// Registers are kept free for so many threads an SM: with 128 for a row of 4096 values, a thousand
/// rows run at once on 100 SMs.
constexpr int kThreadsPerSm = 1280;

template <typename T>
struct NormArgs {
  const T* x;
  T* out;
  const T* weight;
  int64_t x_stride, out_stride, rows;
  int packs;  // of a row
  float eps;
  bool unit_offset, accumulate;
};

/// The sum over all threads of the block, in every thread.
__device__ float block_sum(float value) {
  __shared__ float parts[kMaxThreads / kWarp];
  const int warps = (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  __syncthreads();  // the sums of the row before have been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += parts[warp];
  return sum;
}

/// Keeps the compiler from holding on to what it has made of these values: converting them again
/// takes less than the registers would.
template <typename T>
__device__ void forget(Pack<T>& x) {
  asm volatile("" : "+r"(x.raw.x), "+r"(x.raw.y), "+r"(x.raw.z), "+r"(x.raw.w));
}

template <typename T, int kPacks>
__global__ void __launch_bounds__(kMaxThreads,
                                  kPacks < kMostPacks ? kThreadsPerSm / kMaxThreads : 1)
    norm_kernel(const NormArgs<T> a) {
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    Pack<T> x[kPacks];
    float squares = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int pack = threadIdx.x + p * blockDim.x;
      if (pack >= a.packs) continue;
      x[p] = Pack<T>(a.x + row * a.x_stride + pack * kPack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float value = to_float(x[p].values[i]);
        squares += value * value;
      }
    }
    const float mean = block_sum(squares) / static_cast<float>(a.packs * kPack);
    const float inverse = 1.0f / sqrtf(mean + a.eps);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int pack = threadIdx.x + p * blockDim.x;
      if (pack >= a.packs) continue;
      forget(x[p]);
      T* to = a.out + row * a.out_stride + pack * kPack;
      const Pack<T> weight(a.weight + pack * kPack);
      Pack<T> old;
      if (a.accumulate) old = Pack<T>(to);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        x[p].values[i] = weigh_normal(to_float(x[p].values[i]) * inverse, weight.values[i],
                                      a.unit_offset, a.accumulate ? to_float(old.values[i]) : 0.0f);
      }
      x[p].store(to);
    }
  }
}

template <typename T, int kPacks>
void launch_packs(const NormArgs<T>& args, const CudaLane& lane) {
  const int used = (args.packs + kPacks - 1) / kPacks;
  const int threads = (used + kWarp - 1) / kWarp * kWarp;
  const int grid = grid_size(args.rows, std::max(1, kThreadsPerSm / threads), lane);
  norm_kernel<T, kPacks><<<grid, threads, 0, lane.stream()>>>(args);
  NF_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void launch(const NormArgs<T>& args, const CudaLane& lane) {
  NF_CHECK(args.packs <= kMostPacks * kMaxThreads, RmsNorm::kName,
           " on a GPU takes rows of at most ", kMostPacks * kMaxThreads * kPack, " values, not ",
           args.packs * kPack);
  if (args.packs <= kFewThreads) {
    launch_packs<T, 1>(args, lane);
  } else if (args.packs <= 2 * kFewThreads) {
    launch_packs<T, 2>(args, lane);
  } else if (args.packs <= 4 * kMaxThreads) {
    launch_packs<T, 4>(args, lane);
  } else {
    launch_packs<T, kMostPacks>(args, lane);
  }
}

}  // namespace

void CudaKernels::run(const RmsNorm& op, Lane& lane) {
  check_shapes(op);
  check_packs(RmsNorm::kName, "x", op.x);
  check_packs(RmsNorm::kName, "out", op.out);
  check_packs(RmsNorm::kName, "weight", op.weight);
  if (op.x.size(0) == 0) return;
  dispatch_half(op.x.dtype(), RmsNorm::kName, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(NormArgs<T>{.x = op.x.data<T>(),
                       .out = op.out.data<T>(),
                       .weight = op.weight.data<T>(),
                       .x_stride = op.x.stride(0),
                       .out_stride = op.out.stride(0),
                       .rows = op.x.size(0),
                       .packs = static_cast<int>(op.x.size(1)) / kPack,
                       .eps = op.eps,
                       .unit_offset = op.unit_offset,
                       .accumulate = op.accumulate},
           cuda_lane(lane));
  });
}

}  // namespace nanoflow::cuda
