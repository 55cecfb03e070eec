#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/error.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/math_loops.h"
#include "kernels/cpu/math_scratch.h"
#include "kernels/cpu/sampling.h"
#include "kernels/shapes.h"

// Log-probabilities: a row at a time, each on the thread that is free.

namespace nanoflow::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Ranked {
  float logit = -kInfinity;
  int32_t token = -1;
};

/// A row of logits with the highest of each of its chunks.
struct Row {
  const float* logits;
  int64_t V;
  const float* highest;  // [chunks]

  /// Calls fn(token, logit) for all in chunks whose highest is at least bound(), asked anew for
  /// each.
  template <typename Bound, typename Fn>
  void for_logits(const Bound& bound, const Fn& fn) const {
    for (int64_t begin = 0; begin < V; begin += kLogitChunk) {
      if (highest[begin / kLogitChunk] < bound()) continue;
      for (int64_t i = begin; i < std::min(V, begin + kLogitChunk); ++i) fn(i, logits[i]);
    }
  }
};

/// The `count` > 0 highest of a row in descending order, the lower token first where they tie.
void find_top(const Row& row, int count, Ranked* top) {
  int found = 0;
  const auto bound = [&] { return found < count ? -kInfinity : top[count - 1].logit; };
  row.for_logits(bound, [&](int64_t token, float x) {
    if (found == count && !(x > top[count - 1].logit)) return;
    int place = found < count ? found++ : count - 1;
    for (; place > 0 && x > top[place - 1].logit; --place) top[place] = top[place - 1];
    top[place] = {x, static_cast<int32_t>(token)};
  });
}

int32_t find_rank(const Row& row, float logit) {
  int32_t rank = 0;
  row.for_logits([&] { return logit; }, [&](int64_t, float x) { rank += x >= logit ? 1 : 0; });
  return rank;
}

/// log of the sum of exp(logit), sums taken chunk by chunk.
double log_sum(const SamplingLoops& loops, const Row& row) {
  const int64_t chunks = (row.V + kLogitChunk - 1) / kLogitChunk;
  const float highest = *std::max_element(row.highest, row.highest + chunks);
  float weights[kLogitChunk];
  double total = 0;
  for (int64_t begin = 0; begin < row.V; begin += kLogitChunk) {
    total += loops.weigh(row.logits + begin, std::min(kLogitChunk, row.V - begin), highest, 1.0f,
                         -kInfinity, weights);
  }
  return highest + std::log(total);
}

/// `highest` [chunks] is overwritten.
void find_logprobs(const Logprobs& op, const SamplingLoops& loops, int64_t row, float* highest) {
  const int wanted = op.counts.data<int32_t>()[row];
  if (wanted < 0) return;
  NF_CHECK(wanted <= Logprobs::kMaxTop, "logprobs: row ", row, " wants ", wanted, " tokens, above ",
           Logprobs::kMaxTop);
  const int64_t V = op.logits.size(1);
  const float* logits = op.logits.data<float>() + row * op.logits.stride(0);
  const int32_t target = op.targets.data<int32_t>()[row];
  const int32_t token = target >= 0 ? target : op.sampled.data<int32_t>()[row];
  int32_t& rank = op.ranks.data<int32_t>()[row];
  int32_t* tokens = op.top.data<int32_t>() + row * op.top.stride(0);
  float* logprobs = op.logprobs.data<float>() + row * op.logprobs.stride(0);
  std::fill(tokens, tokens + Logprobs::kMaxTop, -1);
  std::fill(logprobs, logprobs + 1 + Logprobs::kMaxTop, -kInfinity);
  rank = 0;
  if (token < 0) return;  // the row is not finite
  NF_CHECK(token < V, "logprobs: row ", row, " is asked for token ", token,
           " but the vocabulary has ", V);
  const Row all{.logits = logits, .V = V, .highest = highest};
  if (!loops.find_highest(logits, V, highest)) {  // there is a NaN, and no sum
    std::fill(highest, highest + (V + kLogitChunk - 1) / kLogitChunk, kInfinity);
  }
  const double sum = log_sum(loops, all);
  const auto logprob = [sum](float logit) { return static_cast<float>(logit - sum); };
  logprobs[0] = logprob(logits[token]);
  rank = find_rank(all, logits[token]);
  if (wanted == 0) return;
  Ranked top[Logprobs::kMaxTop];
  find_top(all, wanted, top);
  for (int i = 0; i < wanted; ++i) {
    tokens[i] = top[i].token;
    logprobs[1 + i] = logprob(top[i].logit);
  }
}

}  // namespace

void CpuKernels::run(const Logprobs& op, Lane& lane) {
  check_shapes(op);
  const SamplingLoops& loops = loop_set(isa_).sampling;
  ScratchPieces pieces(nullptr);
  pieces.take<float>((op.logits.size(1) + kLogitChunk - 1) / kLogitChunk);
  const size_t scratch = pieces.bytes();
  cpu_lane(lane).enqueue(
      [op, &loops, scratch](const Worker& worker) {
        auto* highest = reinterpret_cast<float*>(worker.scratch() +
                                                 scratch * static_cast<size_t>(worker.index()));
        const int64_t rows = op.logits.size(0);
        for (int64_t row = worker.claim(); row < rows; row = worker.claim()) {
          find_logprobs(op, loops, row, highest);
        }
      },
      scratch * static_cast<size_t>(lane.width()));
}

}  // namespace nanoflow::cpu
