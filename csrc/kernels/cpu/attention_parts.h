#pragma once

// What every attention loop shares; include one of math_<isa>.h first. Only for files that are
// compiled for one instruction set, hence the anonymous namespace.

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/math_scratch.h"
#include "kernels/cpu/math_vec.h"

namespace nanoflow::cpu {
namespace {

/// Calls fn(first, count, page, offset) for the stretches of keys [begin, end) that lie in one
/// page: `first` counts from begin, offset from the start of the page.
template <typename Fn>
void for_pages(const AttentionTile& tile, int begin, int end, const Fn& fn) {
  for (int key = begin; key < end;) {
    const int offset = key % tile.page_size;
    const int left = tile.page_size - offset;
    const int count = left < end - key ? left : end - key;
    fn(key - begin, count, static_cast<int64_t>(tile.page[key / tile.page_size]), offset);
    key += count;
  }
}

/// The running maximum and sum of one query's softmax.
struct Softmax {
  float highest;
  float total;
};

constexpr Softmax kEmptySoftmax{-__builtin_inff(), 0.0f};

/// Turns the first n products of a block into weights relative to the new maximum; the rest of the
/// last vector becomes 0. Returns what earlier weights are to be multiplied by.
inline float soften(float* products, int n, float scale, Softmax& softmax) {
  Vec best = splat(softmax.highest);
  for (int j = 0; j < n; j += kLanes) {
    Vec scaled = load(products + j) * splat(scale);
    if (n - j < kLanes) scaled = first_lanes(scaled, n - j, splat(-__builtin_inff()));
    best = max(best, scaled);
    store(products + j, scaled);
  }
  const float top = highest(best);
  Vec total = splat(0.0f);
  for (int j = 0; j < n; j += kLanes) {
    const Vec weights = exponential(load(products + j) - splat(top));
    total = total + weights;
    store(products + j, weights);
  }
  float factor[kLanes];
  store(factor, exponential(splat(softmax.highest - top)));
  softmax.highest = top;
  softmax.total = softmax.total * factor[0] + sum(total);
  return factor[0];
}

/// out = sums / total
template <typename T>
void normalise(const float* sums, float total, T* out, int64_t D) {
  const Vec factor = splat(1.0f / total);
  for_vectors(D, [=](int64_t d, auto n) { store(out + d, load(sums + d, n) * factor, n); });
}

}  // namespace
}  // namespace nanoflow::cpu
