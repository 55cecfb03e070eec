#pragma once

#include "kernels/cuda/attention.h"

// Where the keys of streamed requests lie on their line, and which warp takes which.

namespace nanoflow::cuda {

struct AttentionLine {
  const AttentionArguments& a;
  AttentionWorkHeader header;
  AttentionWork at;
  int lane;

  __device__ AttentionLine(const AttentionArguments& arguments, const AttentionWorkHeader& h)
      : a(arguments),
        header(h),
        at(AttentionWork::of(h.requests, arguments.kv_heads, h.ctas)),
        lane(threadIdx.x % 32) {}

  template <class Element>
  __device__ Element* list(size_t offset) const {
    return reinterpret_cast<Element*>(a.work + offset);
  }

  struct Cursor {
    AttentionItem item;
    int stream, head;
    int first_key;    // that the row sees
    int step, steps;  // of the item's keys from there on

    __device__ bool ends_item() const { return step + 1 == steps; }
    __device__ int key() const { return (first_key / kStreamKeys + step) * kStreamKeys; }
    /// Keys of the item from this step on.
    __device__ int left() const { return item.kv_len - key(); }
    /// Keys of this step before the first that the row sees.
    __device__ int skipped() const { return max(first_key - key(), 0); }
  };

  __device__ Cursor cursor_of(int stream, int head, int step) const {
    Cursor c{.item = list<AttentionItem>(at.stream_items)[stream],
             .stream = stream,
             .head = head,
             .first_key = 0,
             .step = step,
             .steps = 0};
    c.first_key = cuda::first_key(c.item.kv_len, a.window);
    c.steps = (c.item.kv_len + kStreamKeys - 1) / kStreamKeys - c.first_key / kStreamKeys;
    return c;
  }

  __device__ void advance(Cursor& c) const {
    if (++c.step < c.steps) return;
    c = cursor_of(c.stream + 1, c.head, 0);
  }

  /// The warp's next unit, -1 when there is none: its own, those of the CTAs that the grid lacks,
  /// then shared ones, which whoever has time takes.
  __device__ int next_unit(int unit) const {
    const int warps = static_cast<int>(gridDim.x) * kStreamWarps;
    const int owned = header.num_owned_chunks * a.kv_heads;
    const int shared = header.num_chunks * a.kv_heads - owned;
    if (unit + warps < owned) return unit + warps;
    if (shared == 0) return -1;
    int* const taken = &reinterpret_cast<AttentionWorkHeader*>(a.work)->taken;
    int i = 0;
    if (lane == 0) i = atomicAdd(taken, 1);
    i = __shfl_sync(~0u, i, 0);
    if (i < shared) return owned + i;
    // Every warp comes here once: the last one leaves all as it was, for the next layer.
    if (i + 1 == shared + warps && lane == 0) *taken = 0;
    return -1;
  }
};

}  // namespace nanoflow::cuda
