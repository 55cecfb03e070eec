#include <climits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/grid.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/shapes.h"

// Which experts rows go to, the order in which experts take them, and what becomes of the results.
// Nothing here depends on which block or thread comes first.

namespace nanoflow::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr float kLowest = -INFINITY;

constexpr int kRouteWarps = 8;           // of a block, each with a row at a time
constexpr int kMaxExperts = 64 * kWarp;  // a lane remembers which of 64 have been taken

struct RouteArgs {
  const float* logits;
  int32_t* experts;
  float* weights;
  int64_t logits_stride, experts_stride, weights_stride, rows;
  int count, active;
  bool renormalize;
};

/// The highest logit that is not taken, the lower expert where two tie, in all lanes; NaN counts as
/// the lowest. Lane l looks at experts l + 32 i, which it has taken where bit i is set.
__device__ int next_expert(const float* logits, int count, uint64_t taken, int lane) {
  float best = kLowest;
  int index = INT_MAX;
  for (int expert = lane, i = 0; expert < count; expert += kWarp, ++i) {
    const float logit = isnan(logits[expert]) ? kLowest : logits[expert];
    if ((taken >> i & 1) != 0 || (index != INT_MAX && logit <= best)) continue;
    best = logit;
    index = expert;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, step);
    const int other_index = __shfl_xor_sync(kAllLanes, index, step);
    if (other > best || (other == best && other_index < index)) {
      best = other;
      index = other_index;
    }
  }
  return index;
}

/// The sum of exp(logit - highest), in all lanes.
__device__ float sum_of_exponentials(const float* logits, int count, float highest, int lane) {
  float sum = 0;
  for (int expert = lane; expert < count; expert += kWarp) sum += expf(logits[expert] - highest);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

__global__ void route_kernel(const RouteArgs a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRouteWarps + threadIdx.x / kWarp;
  for (int64_t row = first; row < a.rows; row += static_cast<int64_t>(gridDim.x) * kRouteWarps) {
    const float* logits = a.logits + row * a.logits_stride;
    float* weights = a.weights + row * a.weights_stride;
    uint64_t taken = 0;
    float highest = 0, all = 0, chosen = 0;
    for (int i = 0; i < a.active; ++i) {
      const int expert = next_expert(logits, a.count, taken, lane);
      if (expert % kWarp == lane) taken |= uint64_t{1} << expert / kWarp;
      if (i == 0) {
        highest = logits[expert];
        all = sum_of_exponentials(logits, a.count, highest, lane);
      }
      const float weight = expf(logits[expert] - highest) / all;
      chosen += weight;
      if (i % kWarp == lane) {
        a.experts[row * a.experts_stride + i] = expert;
        weights[i] = weight;
      }
    }
    if (!a.renormalize) continue;
    for (int i = lane; i < a.active; i += kWarp) weights[i] /= chosen;  // each what it has written
  }
}

constexpr int kSortWarps = 32;  // of a block, which places the pairs of one expert at a time
constexpr int kSortThreads = kSortWarps * kWarp;
constexpr int kSortBlocksPerSm = 2;

struct SortArgs {
  const int32_t* experts;  // of all pairs, row by row
  int32_t *offsets, *sources, *places;
  int pairs, count, active;
};

/// Every block reads all pairs twice: to count those of lower experts and its own, and to place its
/// own. The warps share the pairs, in order.
__global__ void sort_kernel(const SortArgs a) {
  __shared__ int lower[kSortWarps], own[kSortWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int share = (a.pairs + kSortThreads - 1) / kSortThreads * kWarp;
  const int begin = min(a.pairs, warp * share), end = min(a.pairs, begin + share);
  for (int expert = blockIdx.x; expert < a.count; expert += gridDim.x) {
    int below = 0, equal = 0;
#pragma unroll 4
    for (int pair = begin + lane; pair < end; pair += kWarp) {
      const int found = a.experts[pair];
      below += found < expert;
      equal += found == expert;
    }
    below = __reduce_add_sync(kAllLanes, below);
    equal = __reduce_add_sync(kAllLanes, equal);
    __syncthreads();  // the counts of the expert before have been read
    if (lane == 0) {
      lower[warp] = below;
      own[warp] = equal;
    }
    __syncthreads();
    int first = 0, place = 0;  // of the expert, and of the warp's next pair behind that
    for (int other = 0; other < kSortWarps; ++other) {
      first += lower[other];
      if (other < warp) place += own[other];
    }
    place += first;
    if (threadIdx.x == 0) {
      a.offsets[expert] = first;
      if (expert == a.count - 1) a.offsets[a.count] = a.pairs;
    }
#pragma unroll 4
    for (int from = begin; from < end; from += kWarp) {
      const int pair = from + lane;
      const bool is_own = pair < end && a.experts[pair] == expert;
      const unsigned all = __ballot_sync(kAllLanes, is_own);
      if (is_own) {
        const int at = place + __popc(all & ((1u << lane) - 1));
        a.places[pair] = at;
        a.sources[at] = pair / a.active;
      }
      place += __popc(all);
    }
  }
}

constexpr int kCombineThreads = 256;
constexpr int kCombineBlocksPerSm = 8;

template <typename T>
struct CombineArgs {
  const T* x;
  const int32_t* places;
  const float* weights;
  T* out;
  int64_t x_stride, places_stride, weights_stride, out_stride, rows;
  int active, packs;  // packs of a row
  bool accumulate;
};

template <typename T>
__global__ void combine_kernel(const CombineArgs<T> a) {
  const int64_t count = a.rows * a.packs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kCombineThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / a.packs, column = i % a.packs * kPack;
    float sums[kPack] = {};
    for (int j = 0; j < a.active; ++j) {
      const int64_t place = a.places[row * a.places_stride + j];
      const float weight = a.weights[row * a.weights_stride + j];
      const Pack<T> x(a.x + place * a.x_stride + column);
#pragma unroll
      for (int k = 0; k < kPack; ++k) sums[k] = fmaf(weight, to_float(x.values[k]), sums[k]);
    }
    T* const at = a.out + row * a.out_stride + column;
    if (a.accumulate) {
      const Pack<T> before(at);
#pragma unroll
      for (int k = 0; k < kPack; ++k) sums[k] += to_float(before.values[k]);
    }
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < kPack; ++k) out.values[k] = from_float<T>(sums[k]);
    out.store(at);
  }
}

}  // namespace

void CudaKernels::run(const RouteExperts& op, Lane& lane) {
  check_shapes(op);
  const RouteArgs args{.logits = op.logits.data<float>(),
                       .experts = op.experts.data<int32_t>(),
                       .weights = op.weights.data<float>(),
                       .logits_stride = op.logits.stride(0),
                       .experts_stride = op.experts.stride(0),
                       .weights_stride = op.weights.stride(0),
                       .rows = op.logits.size(0),
                       .count = static_cast<int>(op.logits.size(1)),
                       .active = static_cast<int>(op.experts.size(1)),
                       .renormalize = op.renormalize};
  NF_CHECK(args.count <= kMaxExperts, RouteExperts::kName, " on a GPU takes at most ", kMaxExperts,
           " experts, not ", args.count);
  if (args.rows == 0) return;
  const CudaLane& own = cuda_lane(lane);
  const int grid = grid_size((args.rows + kRouteWarps - 1) / kRouteWarps, kRouteWarps, own);
  route_kernel<<<grid, kRouteWarps * kWarp, 0, own.stream()>>>(args);
  NF_CUDA_CHECK(cudaGetLastError());
}

void CudaKernels::run(const SortByExpert& op, Lane& lane) {
  check_shapes(op);
  NF_CHECK(op.experts.numel() <= INT_MAX - kSortThreads, SortByExpert::kName,
           " on a GPU takes fewer pairs than ", op.experts);
  const SortArgs args{.experts = op.experts.data<int32_t>(),
                      .offsets = op.offsets.data<int32_t>(),
                      .sources = op.sources.data<int32_t>(),
                      .places = op.places.data<int32_t>(),
                      .pairs = static_cast<int>(op.experts.numel()),
                      .count = static_cast<int>(op.offsets.size(0)) - 1,
                      .active = static_cast<int>(op.experts.size(1))};
  const CudaLane& own = cuda_lane(lane);
  sort_kernel<<<grid_size(args.count, kSortBlocksPerSm, own), kSortThreads, 0, own.stream()>>>(
      args);
  NF_CUDA_CHECK(cudaGetLastError());
}

void CudaKernels::run(const CombineExperts& op, Lane& lane) {
  check_shapes(op);
  check_packs(CombineExperts::kName, "x", op.x);
  check_packs(CombineExperts::kName, "out", op.out);
  if (op.out.size(0) == 0) return;
  const CudaLane& own = cuda_lane(lane);
  dispatch_half(op.x.dtype(), CombineExperts::kName, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const CombineArgs<T> args{.x = op.x.data<T>(),
                              .places = op.places.data<int32_t>(),
                              .weights = op.weights.data<float>(),
                              .out = op.out.data<T>(),
                              .x_stride = op.x.stride(0),
                              .places_stride = op.places.stride(0),
                              .weights_stride = op.weights.stride(0),
                              .out_stride = op.out.stride(0),
                              .rows = op.out.size(0),
                              .active = static_cast<int>(op.places.size(1)),
                              .packs = static_cast<int>(op.out.size(1)) / kPack,
                              .accumulate = op.accumulate};
    const int64_t blocks = (args.rows * args.packs + kCombineThreads - 1) / kCombineThreads;
    const int grid = grid_size(blocks, kCombineBlocksPerSm, own);
    combine_kernel<<<grid, kCombineThreads, 0, own.stream()>>>(args);
  });
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
