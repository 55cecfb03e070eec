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

/// The running maximum and sum of a softmax, of each query of a tile.
struct Softmax {
  float* highest;
  float* total;
};

/// Writes the output of all queries: their sums [rows * group, width] over the totals of their
/// weights.
template <typename T>
void write_out(const AttentionTile& tile, const float* sums, int64_t width, const float* totals) {
  for (int row = 0; row < tile.rows; ++row) {
    T* out = static_cast<T*>(tile.out) + row * tile.out_stride;
    for (int i = 0; i < tile.group; ++i, out += tile.head_dim, sums += width, ++totals) {
      const Vec factor = splat(1.0f / *totals);
      for_vectors(tile.head_dim,
                  [=](int64_t d, auto n) { store(out + d, load(sums + d, n) * factor, n); });
    }
  }
}

}  // namespace
}  // namespace nanoflow::cpu
