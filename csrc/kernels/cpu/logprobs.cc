#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/error.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/math_loops.h"
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

/// The `count` highest of a row in descending order, the lower token first where they tie.
void find_top(const float* logits, int64_t V, int count, Ranked* top) {
  int found = 0;
  for (int64_t token = 0; token < V; ++token) {
    const float x = logits[token];
    if (found == count && !(x > top[count - 1].logit)) continue;
    int place = found < count ? found++ : count - 1;
    for (; place > 0 && x > top[place - 1].logit; --place) top[place] = top[place - 1];
    top[place] = {x, static_cast<int32_t>(token)};
  }
}

/// log of the sum of exp(logit), sums taken chunk by chunk.
double log_sum(const SamplingLoops& loops, const float* logits, int64_t V) {
  const float highest = *std::max_element(logits, logits + V);
  float weights[kLogitChunk];
  double total = 0;
  for (int64_t begin = 0; begin < V; begin += kLogitChunk) {
    total += loops.weigh(logits + begin, std::min(kLogitChunk, V - begin), highest, 1.0f,
                         -kInfinity, weights);
  }
  return highest + std::log(total);
}

void find_logprobs(const Logprobs& op, const SamplingLoops& loops, int64_t row) {
  const int wanted = op.counts.data<int32_t>()[row];
  if (wanted < 0) return;
  NF_CHECK(wanted <= Logprobs::kMaxTop, "logprobs: row ", row, " wants ", wanted, " tokens, above ",
           Logprobs::kMaxTop);
  const int64_t V = op.logits.size(1);
  const float* logits = op.logits.data<float>() + row * op.logits.stride(0);
  const int32_t sampled = op.sampled.data<int32_t>()[row];
  int32_t& rank = op.ranks.data<int32_t>()[row];
  int32_t* tokens = op.top.data<int32_t>() + row * op.top.stride(0);
  float* logprobs = op.logprobs.data<float>() + row * op.logprobs.stride(0);
  std::fill(tokens, tokens + Logprobs::kMaxTop, -1);
  std::fill(logprobs, logprobs + 1 + Logprobs::kMaxTop, -kInfinity);
  rank = 0;
  if (sampled < 0) return;  // the row is not finite
  NF_CHECK(sampled < V, "logprobs: row ", row, " sampled token ", sampled,
           " but the vocabulary has ", V);
  const double sum = log_sum(loops, logits, V);
  const auto logprob = [sum](float logit) { return static_cast<float>(logit - sum); };
  logprobs[0] = logprob(logits[sampled]);
  rank = static_cast<int32_t>(
      std::count_if(logits, logits + V, [&](float x) { return x >= logits[sampled]; }));
  Ranked top[Logprobs::kMaxTop];
  find_top(logits, V, wanted, top);
  for (int i = 0; i < wanted; ++i) {
    tokens[i] = top[i].token;
    logprobs[1 + i] = logprob(top[i].logit);
  }
}

}  // namespace

void CpuKernels::run(const Logprobs& op, Lane& lane) {
  check_shapes(op);
  const SamplingLoops& loops = loop_set(isa_).sampling;
  cpu_lane(lane).enqueue([op, &loops](const Worker& worker) {
    const int64_t rows = op.logits.size(0);
    for (int64_t row = worker.claim(); row < rows; row = worker.claim()) {
      find_logprobs(op, loops, row);
    }
  });
}

}  // namespace nanoflow::cpu
