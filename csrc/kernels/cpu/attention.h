#pragma once

#include <cstddef>
#include <cstdint>

namespace nanoflow::cpu {

/// Keys are taken in blocks at multiples of this position, whatever the pages, so that a row's sums
/// never depend on which rows share its tile.
constexpr int kKeyBlock = 64;

/// Some rows of one request, with the query heads that share one KV head. Pointers are to elements
/// of the dtype the loops were compiled for; strides count elements.
struct AttentionTile {
  const void* q;  // [rows, group, D]: rows q_stride apart, the rest contiguous
  void* out;      // likewise
  int64_t q_stride, out_stride;
  int rows, group, head_dim;
  int first_limit;      // key that the first row ends before; each next row ends one further on
  int window;           // keys that a row sees at most
  const void *k, *v;    // [P, page_size, D] of this KV head
  const int32_t* page;  // numbers of the request's pages
  int64_t k_page_stride, v_page_stride, k_token_stride, v_token_stride;
  int page_size;
  float scale;

  /// Key that the last row ends before.
  int last_limit() const { return first_limit + rows - 1; }
  /// First key that a row sees.
  int begin_of(int row) const {
    const int limit = first_limit + row;
    return limit > window ? limit - window : 0;
  }
  /// First key of the first block that a row sees.
  int first_block() const { return begin_of(0) / kKeyBlock * kKeyBlock; }
};

struct AttentionLoops {
  /// Rows of a full tile, for the number of query heads in a group.
  int (*tile_rows)(int group);
  /// 64-byte aligned scratch that attend() needs for a full tile.
  size_t (*scratch_bytes)(int group, int head_dim);
  /// `next` is what this thread attends to afterwards, or null: its first keys may be fetched.
  void (*attend)(const AttentionTile& tile, const AttentionTile* next, std::byte* scratch);
};

}  // namespace nanoflow::cpu
