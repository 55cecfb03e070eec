#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/grid.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/sampling.cuh"
#include "kernels/shapes.h"

// Log-probabilities: a block takes a row. One pass gives the sum of exponentials, the rank of the
// sampled token and the highest logit of each thread's column (the tokens it reads). The likeliest
// tokens are then taken one at a time from the columns' highest; all threads look for the next of
// the column that gave one. No sum depends on anything but the vocabulary's size.

namespace nanoflow::cuda {
namespace {

constexpr int kLogprobBlocksPerSm = 2;
constexpr int kTokensAtOnce = 8;
constexpr float kLog2OfE = 1.44269504f;

struct LogprobsArgs {
  const float* logits;  // [S, V]
  int64_t stride;
  int rows, vocabulary;
  const int32_t *sampled, *targets, *counts;
  int32_t* top;  // [S, kMaxTop]
  int64_t top_stride;
  float* logprobs;  // [S, 1 + kMaxTop]
  int64_t logprobs_stride;
  int32_t* ranks;
};

/// A token by its logit, comparable: the highest logit first, then the lowest token. 0 is none.
using Candidate = unsigned long long;

__device__ Candidate candidate(float logit, int token) {
  return Candidate{key_of(logit)} << 32 | static_cast<unsigned>(~token);
}
__device__ int token_of(Candidate of) { return static_cast<int>(~static_cast<unsigned>(of)); }
__device__ float logit_of(Candidate of) { return logit_of(static_cast<uint32_t>(of >> 32)); }

struct LogprobsShared {
  Candidate parts[kWarps];
  float tops[kWarps], sums[kWarps];
  unsigned ranks[kWarps];
};

/// The highest of all threads' candidates, in every thread.
__device__ Candidate block_max(LogprobsShared& s, Candidate own) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    own = max(own, __shfl_xor_sync(kAllLanes, own, step));
  }
  if (threadIdx.x % kWarp == 0) s.parts[threadIdx.x / kWarp] = own;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) own = max(own, s.parts[warp]);
  __syncthreads();
  return own;
}

/// exp(logit - top) summed, without a NaN where there has been nothing yet.
struct ExpSum {
  float top = -INFINITY, sum = 0;

  __device__ void raise(float highest) {
    if (highest <= top) return;
    sum *= exp2f((top - highest) * kLog2OfE);
    top = highest;
  }
  __device__ float term(float x) const { return exp2f((x - top) * kLog2OfE); }
  __device__ void add(const ExpSum& other) {
    raise(other.top);
    if (other.top > -INFINITY) sum += other.sum * term(other.top);
  }
};

struct Scan {
  ExpSum exps;
  Candidate highest = 0;  // without those that have been taken
  unsigned rank = 0;      // tokens with at least the sampled one's logit
};

/// Of this thread's column.
__device__ Scan scan_column(const float* logits, int vocabulary, float sampled) {
  Scan scan;
  float best = -INFINITY;
  int best_token = -1;
  for (int first = threadIdx.x; first < vocabulary; first += kThreads * kTokensAtOnce) {
    float x[kTokensAtOnce], highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i) {
      const int token = first + i * kThreads;
      x[i] = token < vocabulary ? logits[token] : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i) {
      const int token = first + i * kThreads;
      if (token < vocabulary && (x[i] > best || best_token < 0)) {
        best = x[i];
        best_token = token;
      }
      scan.rank += token < vocabulary && x[i] >= sampled ? 1 : 0;
      highest = fmaxf(highest, x[i]);
    }
    scan.exps.raise(highest);
    if (scan.exps.top == -INFINITY) continue;
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i) scan.exps.sum += scan.exps.term(x[i]);
  }
  if (best_token >= 0) scan.highest = candidate(best, best_token);
  return scan;
}

/// The sums and the rank of all columns, in every thread.
__device__ void combine(LogprobsShared& s, Scan& scan) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const ExpSum other{__shfl_down_sync(kAllLanes, scan.exps.top, step),
                       __shfl_down_sync(kAllLanes, scan.exps.sum, step)};
    scan.exps.add(other);
    scan.rank += __shfl_down_sync(kAllLanes, scan.rank, step);
  }
  if (threadIdx.x % kWarp == 0) {
    s.tops[threadIdx.x / kWarp] = scan.exps.top;
    s.sums[threadIdx.x / kWarp] = scan.exps.sum;
    s.ranks[threadIdx.x / kWarp] = scan.rank;
  }
  __syncthreads();
  scan.exps = {};
  scan.rank = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    scan.exps.add({s.tops[warp], s.sums[warp]});
    scan.rank += s.ranks[warp];
  }
  __syncthreads();
}

/// The highest of a column below one of its candidates, looked for by all threads.
__device__ Candidate next_of_column(LogprobsShared& s, const float* logits, int vocabulary,
                                    Candidate below) {
  const int column = token_of(below) % kThreads;
  Candidate own = 0;
  for (int token = column + static_cast<int>(threadIdx.x) * kThreads; token < vocabulary;
       token += kThreads * kThreads) {
    const Candidate found = candidate(logits[token], token);
    if (found < below) own = max(own, found);
  }
  return block_max(s, own);
}

__device__ void find_logprobs(LogprobsShared& s, const LogprobsArgs& a, int row) {
  const float* logits = a.logits + row * a.stride;
  const int token = a.targets[row] >= 0 ? a.targets[row] : a.sampled[row];
  const bool is_valid = token >= 0 && token < a.vocabulary;
  int32_t* top = a.top + row * a.top_stride;
  float* logprobs = a.logprobs + row * a.logprobs_stride;
  const int count = is_valid ? min(min(a.counts[row], Logprobs::kMaxTop), a.vocabulary) : 0;
  // What is not wanted, or is not there.
  if (threadIdx.x >= count && threadIdx.x < Logprobs::kMaxTop) {
    top[threadIdx.x] = -1;
    logprobs[1 + threadIdx.x] = -INFINITY;
  }
  if (!is_valid) {  // the row is not finite
    if (threadIdx.x == 0) {
      logprobs[0] = -INFINITY;
      a.ranks[row] = 0;
    }
    return;
  }
  Scan scan = scan_column(logits, a.vocabulary, logits[token]);
  combine(s, scan);
  const float log_sum = logf(scan.exps.sum);
  const auto logprob = [&](float logit) { return logit - scan.exps.top - log_sum; };
  if (threadIdx.x == 0) {
    logprobs[0] = logprob(logits[token]);
    a.ranks[row] = static_cast<int32_t>(scan.rank);
  }
  for (int i = 0; i < count; ++i) {
    const Candidate next = block_max(s, scan.highest);
    if (threadIdx.x == 0) {
      top[i] = token_of(next);
      logprobs[1 + i] = logprob(logit_of(next));
    }
    if (i + 1 == count) break;
    const Candidate after = next_of_column(s, logits, a.vocabulary, next);
    if (threadIdx.x == token_of(next) % kThreads) scan.highest = after;
  }
}

__global__ void __launch_bounds__(kThreads, kLogprobBlocksPerSm)
    logprobs_kernel(const LogprobsArgs a) {
  __shared__ LogprobsShared s;
  for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
    if (a.counts[row] >= 0) find_logprobs(s, a, row);
  }
}

}  // namespace

void CudaKernels::run(const Logprobs& op, Lane& lane) {
  check_shapes(op);
  const LogprobsArgs args{.logits = op.logits.data<float>(),
                          .stride = op.logits.stride(0),
                          .rows = static_cast<int>(op.logits.size(0)),
                          .vocabulary = static_cast<int>(op.logits.size(1)),
                          .sampled = op.sampled.data<int32_t>(),
                          .targets = op.targets.data<int32_t>(),
                          .counts = op.counts.data<int32_t>(),
                          .top = op.top.data<int32_t>(),
                          .top_stride = op.top.stride(0),
                          .logprobs = op.logprobs.data<float>(),
                          .logprobs_stride = op.logprobs.stride(0),
                          .ranks = op.ranks.data<int32_t>()};
  if (args.rows == 0) return;
  const CudaLane& own = cuda_lane(lane);
  const int grid = grid_size(args.rows, kLogprobBlocksPerSm, own);
  logprobs_kernel<<<grid, kThreads, 0, own.stream()>>>(args);
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
