#include <cfloat>

#include "kernels/cuda/check.h"
#include "kernels/cuda/grid.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/sampling.cuh"
#include "kernels/random.h"
#include "kernels/shapes.h"

// Sampling: a block takes a row. Filters are applied as on the CPU: temperature, min_p, top_k,
// top_p, each on what the one before has left. As all of them keep the tokens of the highest
// logits, each only raises the row's cutoff; the draw is one inverse of the cumulative distribution
// in order of tokens. Weights are whole numbers, so sums do not depend on the order of threads.

namespace nanoflow::cuda {
namespace {

constexpr int kBlocksPerSm = 3;
constexpr float kLog2E = 1.44269504f;

struct SampleArgs {
  float* logits;  // [S, V]
  int64_t stride;
  int rows, vocabulary, pool_size;
  const int32_t *slots, *top_k, *counter, *banned_indptr, *banned;
  const float *temperature, *top_p, *min_p;
  const uint64_t* seed;
  int32_t *token_pool, *sampled;
};

__device__ void ban(const SampleArgs& a, int row) {
  float* logits = a.logits + row * a.stride;
  for (int i = a.banned_indptr[row] + threadIdx.x; i < a.banned_indptr[row + 1]; i += kThreads) {
    const int token = a.banned[i];
    if (token >= 0 && token < a.vocabulary) logits[token] = -INFINITY;
  }
  __syncthreads();
}

/// Keeps the k highest logits and whatever ties with the last of them.
__device__ void apply_top_k(Shared& s, Row& row, int k) {
  const auto ones = [](float) { return Mass{1}; };
  fill_bins(s, row, ones);
  const Crossing border = find_crossing(s, s.bins, kBins, true, static_cast<Mass>(k));
  if (border.index < 0) return;  // what lies beyond the bins has no mass
  row.cut = select(s, row, border.index, static_cast<Mass>(k) - border.before, ones).logit;
}

/// Keeps a token if those before it, the highest logits first and ties in order of tokens, have
/// less than p of the mass: at least one.
__device__ void apply_top_p(Shared& s, Row& row, float p) {
  const auto mass = [&row](float x) { return row.mass_of(x); };
  fill_bins(s, row, mass);
  __syncthreads();
  Mass total = 0;
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) total += s.bins[bin].value();
  total = block_sum(s, total);
  const Mass limit =
      max(Mass{1}, static_cast<Mass>(ceil(static_cast<double>(p) * static_cast<double>(total))));
  const Crossing border = find_crossing(s, s.bins, kBins, true, limit);
  const Selected last = select(s, row, border.index, limit - border.before, mass);
  const Mass each = row.mass_of(last.logit);
  const Mass needed = limit - border.before - last.above;
  const Mass kept_ties = (needed + each - 1) / each;
  row.cut = last.logit;
  if (kept_ties >= last.tied / each) return;
  row.last_tied = locate(
      s, row, [&row](int, float x) { return x == row.cut ? Mass{1} : Mass{0}; },
      [kept_ties](Mass) { return kept_ties - 1; });
}

__device__ int draw(Shared& s, const Row& row, double u) {
  return locate(
      s, row, [&row](int token, float x) { return row.keeps(token, x) ? row.mass_of(x) : 0; },
      [u](Mass total) {
        return min(total - 1, static_cast<Mass>(u * static_cast<double>(total)));
      });
}

__device__ int sample_row(Shared& s, const SampleArgs& a, int index) {
  Row row(a.logits + index * a.stride, a.vocabulary);
  const Highest highest = find_highest(s, row);
  if (highest.is_bad || !isfinite(highest.logit)) return Sample::kInvalidLogits;
  const float temperature = a.temperature[index];
  if (!(temperature > 0.0f)) return highest.token;
  row.top = highest.logit;
  row.log2_scale = fminf(kLog2E / temperature, FLT_MAX);
  const float min_p = a.min_p[index], top_p = a.top_p[index];
  const int top_k = a.top_k[index];
  if (min_p > 0.0f) row.cut = row.top + temperature * logf(fminf(min_p, 1.0f));
  if (top_k > 0 && top_k < row.count) apply_top_k(s, row, top_k);
  if (top_p < 1.0f) apply_top_p(s, row, top_p);
  return draw(s, row, uniform(a.seed[index], static_cast<uint32_t>(a.counter[index])));
}

__global__ void __launch_bounds__(kThreads, 2) sample_kernel(const SampleArgs a) {
  __shared__ Shared s;
  for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int slot = a.slots[row];
    if (slot < 0) {
      if (threadIdx.x == 0) a.sampled[row] = -1;
      continue;
    }
    ban(a, row);
    const int token = sample_row(s, a, row);
    if (threadIdx.x == 0) {
      a.sampled[row] = token;
      // A token that the next step can embed: the request fails once its owner has seen `sampled`.
      if (slot < a.pool_size) a.token_pool[slot] = max(token, 0);
    }
    __syncthreads();
  }
}

}  // namespace

void CudaKernels::run(const Sample& op, Lane& lane) {
  check_shapes(op);
  const SamplingTables& tables = op.tables;
  const SampleArgs args{.logits = op.logits.data<float>(),
                        .stride = op.logits.stride(0),
                        .rows = static_cast<int>(op.logits.size(0)),
                        .vocabulary = static_cast<int>(op.logits.size(1)),
                        .pool_size = static_cast<int>(op.token_pool.size(0)),
                        .slots = tables.slots.data<int32_t>(),
                        .top_k = tables.top_k.data<int32_t>(),
                        .counter = tables.counter.data<int32_t>(),
                        .banned_indptr = tables.banned_indptr.data<int32_t>(),
                        .banned = tables.banned.data<int32_t>(),
                        .temperature = tables.temperature.data<float>(),
                        .top_p = tables.top_p.data<float>(),
                        .min_p = tables.min_p.data<float>(),
                        .seed = tables.seed.data<uint64_t>(),
                        .token_pool = op.token_pool.data<int32_t>(),
                        .sampled = op.sampled.data<int32_t>()};
  NF_CHECK(args.vocabulary <= kMaxVocabulary, "sample on a GPU takes at most ", kMaxVocabulary,
           " logits a row, not ", args.vocabulary);
  if (args.rows == 0) return;
  const CudaLane& own = cuda_lane(lane);
  sample_kernel<<<grid_size(args.rows, kBlocksPerSm, own), kThreads, 0, own.stream()>>>(args);
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
