#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/grid.h"
#include "kernels/cuda/kernels.h"
#include "kernels/shapes.h"

// What requests have said so far, and what it costs them to say it again. What lies outside a
// tensor is left alone.

namespace nanoflow::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWindow = 12288;  // tokens that a block counts, in 48 KB
constexpr int kBlocksPerSm = 4;
constexpr unsigned kInPrompt = 1u << 31;  // in what is counted of a token: the prompt holds it

struct History {
  int32_t* tokens;  // [slots, positions]
  int64_t stride;
  int slots, positions;

  explicit History(const Tensor& tensor)
      : tokens(tensor.data<int32_t>()),
        stride(tensor.stride(0)),
        slots(static_cast<int>(tensor.size(0))),
        positions(static_cast<int>(tensor.size(1))) {}
};

struct PenalizeArgs {
  float* logits;  // [S, V]
  int64_t stride;
  int rows, vocabulary;
  History history;
  const int32_t *slots, *length, *generated;
  const float *presence, *frequency, *repetition;
};

/// Rounds as the CPU does: no fused operation.
__device__ float penalized(const PenalizeArgs& a, int row, float logit, unsigned seen) {
  const float repetition = a.repetition[row];
  logit = logit > 0.0f ? __fdiv_rn(logit, repetition) : __fmul_rn(logit, repetition);
  const unsigned times = seen & ~kInPrompt;
  if (times == 0) return logit;
  const float frequent = __fmul_rn(a.frequency[row], static_cast<float>(times));
  return __fsub_rn(__fsub_rn(logit, frequent), a.presence[row]);
}

/// A block takes a row and a window of the vocabulary: it counts the history's tokens in the
/// window, then whoever comes first to a token takes its count, zeroes it and applies it.
__global__ void __launch_bounds__(kThreads) penalize_kernel(const PenalizeArgs a) {
  __shared__ unsigned seen[kWindow];
  for (int i = threadIdx.x; i < kWindow; i += kThreads) seen[i] = 0;
  __syncthreads();
  const int windows = (a.vocabulary + kWindow - 1) / kWindow;
  for (int item = blockIdx.x; item < a.rows * windows; item += gridDim.x) {
    const int row = item / windows, begin = item % windows * kWindow;
    const int length = min(a.length[row], a.history.positions), slot = a.slots[row];
    if (length <= 0 || slot < 0 || slot >= a.history.slots) continue;
    const auto size = static_cast<unsigned>(min(kWindow, a.vocabulary - begin));
    const int32_t* history = a.history.tokens + slot * a.history.stride;
    const int prompt = length - a.generated[row];
    for (int i = threadIdx.x; i < length; i += kThreads) {
      const auto place = static_cast<unsigned>(history[i]) - begin;
      if (place >= size) continue;
      if (i < prompt) {
        atomicOr(&seen[place], kInPrompt);
      } else {
        atomicAdd(&seen[place], 1u);
      }
    }
    __syncthreads();
    float* logits = a.logits + row * a.stride + begin;
    for (int i = threadIdx.x; i < length; i += kThreads) {
      const auto place = static_cast<unsigned>(history[i]) - begin;
      if (place >= size) continue;
      const unsigned found = atomicExch(&seen[place], 0u);
      if (found != 0) logits[place] = penalized(a, row, logits[place], found);
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    record_kernel(const int32_t* sampled, const int32_t* slots, const int32_t* length, int rows,
                  History history) {
  for (int row = blockIdx.x * kThreads + threadIdx.x; row < rows; row += gridDim.x * kThreads) {
    const int slot = slots[row], place = length[row];
    if (place <= 0 || place >= history.positions || slot < 0 || slot >= history.slots) continue;
    history.tokens[slot * history.stride + place] = max(sampled[row], 0);  // as Sample has it
  }
}

}  // namespace

void CudaKernels::run(const Penalize& op, Lane& lane) {
  check_shapes(op);
  const PenaltyTables& tables = op.tables;
  const PenalizeArgs args{.logits = op.logits.data<float>(),
                          .stride = op.logits.stride(0),
                          .rows = static_cast<int>(op.logits.size(0)),
                          .vocabulary = static_cast<int>(op.logits.size(1)),
                          .history = History(op.history),
                          .slots = tables.slots.data<int32_t>(),
                          .length = tables.length.data<int32_t>(),
                          .generated = tables.generated.data<int32_t>(),
                          .presence = tables.presence.data<float>(),
                          .frequency = tables.frequency.data<float>(),
                          .repetition = tables.repetition.data<float>()};
  const int64_t items = int64_t{args.rows} * ((args.vocabulary + kWindow - 1) / kWindow);
  NF_CHECK(items <= INT32_MAX, "penalize on a GPU: ", op.logits, " has too many rows");
  if (items == 0) return;
  const CudaLane& own = cuda_lane(lane);
  const int grid = grid_size(items, kBlocksPerSm, own);
  penalize_kernel<<<grid, kThreads, 0, own.stream()>>>(args);
  NF_CUDA_CHECK(cudaGetLastError());
}

void CudaKernels::run(const RecordSamples& op, Lane& lane) {
  check_shapes(op);
  const auto rows = static_cast<int>(op.sampled.size(0));
  if (rows == 0) return;
  const CudaLane& own = cuda_lane(lane);
  const int grid = grid_size((rows + kThreads - 1) / kThreads, 1, own);
  record_kernel<<<grid, kThreads, 0, own.stream()>>>(
      op.sampled.data<int32_t>(), op.slots.data<int32_t>(), op.length.data<int32_t>(), rows,
      History(op.history));
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
