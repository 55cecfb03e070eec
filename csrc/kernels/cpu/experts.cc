#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/error.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/math_loops.h"
#include "kernels/shapes.h"

// Which experts rows go to, the order in which experts take them, and what becomes of the results.

namespace nanoflow::cpu {
namespace {

/// The highest of `logits` [E] that is none of `taken`; NaN counts as the lowest.
int32_t next_expert(const float* logits, int64_t E, const int32_t* taken, int64_t count) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  int32_t best = -1;
  float highest = kLowest;
  for (int32_t expert = 0; expert < E; ++expert) {
    if (std::find(taken, taken + count, expert) != taken + count) continue;
    const float logit = std::isnan(logits[expert]) ? kLowest : logits[expert];
    if (best >= 0 && logit <= highest) continue;
    best = expert;
    highest = logit;
  }
  return best;
}

void route_row(const RouteExperts& op, int64_t row) {
  const int64_t E = op.logits.size(1), A = op.experts.size(1);
  const float* logits = op.logits.data<float>() + row * op.logits.stride(0);
  int32_t* experts = op.experts.data<int32_t>() + row * op.experts.stride(0);
  float* weights = op.weights.data<float>() + row * op.weights.stride(0);
  for (int64_t i = 0; i < A; ++i) experts[i] = next_expert(logits, E, experts, i);
  const float highest = logits[experts[0]];
  float all = 0.0f, chosen = 0.0f;
  for (int64_t expert = 0; expert < E; ++expert) all += std::exp(logits[expert] - highest);
  for (int64_t i = 0; i < A; ++i) {
    weights[i] = std::exp(logits[experts[i]] - highest) / all;
    chosen += weights[i];
  }
  if (!op.renormalize) return;
  for (int64_t i = 0; i < A; ++i) weights[i] /= chosen;
}

/// Counts, then deals: stable, and in one pass of the pairs each.
void sort_by_expert(const SortByExpert& op) {
  const int64_t A = op.experts.size(1), pairs = op.experts.numel(), E = op.offsets.size(0) - 1;
  const int32_t* experts = op.experts.data<int32_t>();
  std::vector<int32_t> next(static_cast<size_t>(E) + 1, 0);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    NF_CHECK(experts[pair] >= 0 && experts[pair] < E, "sort_by_expert: row ", pair / A,
             " has expert ", experts[pair], " of ", E);
    ++next[static_cast<size_t>(experts[pair]) + 1];
  }
  for (int64_t expert = 0; expert < E; ++expert) next[expert + 1] += next[expert];
  std::copy(next.begin(), next.end(), op.offsets.data<int32_t>());
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int32_t place = next[experts[pair]]++;
    op.places.data<int32_t>()[pair] = place;
    op.sources.data<int32_t>()[place] = static_cast<int32_t>(pair / A);
  }
}

}  // namespace

void CpuKernels::run(const RouteExperts& op, Lane& lane) {
  check_shapes(op);
  cpu_lane(lane).enqueue([op](const Worker& worker) {
    const auto [begin, end] = worker.share(op.logits.size(0));
    for (int64_t row = begin; row < end; ++row) route_row(op, row);
  });
}

void CpuKernels::run(const SortByExpert& op, Lane& lane) {
  check_shapes(op);
  cpu_lane(lane).enqueue([op](const Worker& worker) {
    if (worker.index() == 0) sort_by_expert(op);
  });
}

void CpuKernels::run(const CombineExperts& op, Lane& lane) {
  const PointwiseLoops& loops = loop_set(isa_).of(op.x.dtype(), CombineExperts::kName).pointwise;
  check_shapes(op);
  cpu_lane(lane).enqueue([op, &loops](const Worker& worker) {
    const auto item = static_cast<int64_t>(size_of(op.x.dtype()));
    const int64_t A = op.places.size(1), places = op.x.size(0);
    const auto [begin, end] = worker.share(op.out.size(0));
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* own = op.places.data<int32_t>() + row * op.places.stride(0);
      for (int64_t i = 0; i < A; ++i) {
        NF_CHECK(own[i] >= 0 && own[i] < places, "combine_experts: row ", row, " has place ",
                 own[i], " of ", places);
      }
      loops.add_weighted(
          op.x.bytes(), op.x.stride(0), own, op.weights.data<float>() + row * op.weights.stride(0),
          A, op.out.bytes() + row * op.out.stride(0) * item, op.out.size(1), op.accumulate);
    }
  });
}

}  // namespace nanoflow::cpu
