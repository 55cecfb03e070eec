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

/// Where the keys and values of a block lie.
template <typename T>
struct BlockRows {
  int n = 0;  // keys
  const T* k[kKeyBlock];
  const T* v[kKeyBlock];

  void find(const AttentionTile& tile, int begin) {
    const int left = tile.last_limit() - begin;
    n = left < kKeyBlock ? left : kKeyBlock;
    for_pages(tile, begin, begin + n, [&](int first, int count, int64_t page, int64_t offset) {
      const T* keys = static_cast<const T*>(tile.k) + page * tile.k_page_stride;
      const T* values = static_cast<const T*>(tile.v) + page * tile.v_page_stride;
      for (int i = 0; i < count; ++i) {
        k[first + i] = keys + (offset + i) * tile.k_token_stride;
        v[first + i] = values + (offset + i) * tile.v_token_stride;
      }
    });
  }

  /// The block after that from `begin` on, or the first of the next tile; none after the last.
  void find_next(const AttentionTile& tile, int begin, const AttentionTile* next) {
    n = 0;
    if (begin + kKeyBlock < tile.last_limit()) {
      find(tile, begin + kKeyBlock);
    } else if (next != nullptr) {
      find(*next, next->first_block());
    }
  }
};

/// Asks for the keys and values of the block after the one in hand to be brought from memory, one
/// at a time and all along, as a core waits for few lines at once.
template <typename T>
class Ahead {
 public:
  Ahead(const BlockRows<T>& rows, int64_t D) : rows_(rows), D_(D) {}

  void fetch() {
    if (key_ >= rows_.n) return;
    for (int64_t d = 0; d < D_; d += static_cast<int64_t>(64 / sizeof(T))) {
      __builtin_prefetch(rows_.k[key_] + d);
      __builtin_prefetch(rows_.v[key_] + d);
    }
    ++key_;
  }
  /// Fetches on until as much has been asked for as `done` of `all` is.
  void keep_up(int done, int all) {
    while (key_ * all < done * rows_.n) fetch();
  }
  /// The same with the queries of a tile, whose products with keys are half of the work.
  void keep_up_with(const AttentionTile& tile, int query) {
    const int queries = tile.rows * tile.group;
    keep_up(queries + query + 1, 2 * queries);
  }

 private:
  const BlockRows<T>& rows_;
  int64_t D_;
  int key_ = 0;
};

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
