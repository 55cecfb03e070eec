#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

#ifdef __CUDACC__
#define NF_HOST_DEVICE __host__ __device__
#else
#define NF_HOST_DEVICE
#endif

// Attention runs as one persistent kernel of a CTA an SM. What it does is a work list in device
// memory, made once a step by the plan kernel and read by the kernels of all layers, so a launch
// never depends on the batch.
//
// The query heads of a KV head are packed: a request with n rows has n * Hq / Hkv packed rows,
// token-major. A request of at most 16 packed rows is *streamed*: its keys pass by one warp, 16 at
// a time. The keys of all such requests and KV heads lie end to end on one line that is cut into
// equal ranges, one a warp; items that a cut divides leave partial results, and the warp that
// finishes last merges them. A longer request is *tiled*: a CTA takes 128 packed rows.

namespace nanoflow::cuda {

inline constexpr int kAttentionWarps = 8;  // of a CTA
inline constexpr int kStreamRows = 16;     // packed rows of a streamed request, at most
inline constexpr int kStreamKeys = 16;     // keys a warp takes at a time
inline constexpr int kTileRows = 128;      // packed rows of a tile
inline constexpr int kTileKeys = 64;       // keys a CTA takes at a time
inline constexpr int kAttentionThreads = 32 * kAttentionWarps;
inline constexpr int kMaxAttentionCtas = 512;  // a plan is made for at most
inline constexpr int kNoWindow = 1 << 30;      // keys that a row sees at most

/// A request of the work list.
struct AttentionItem {
  int row_begin, row_count;  // rows of q and out
  int kv_len;
  int page_begin;  // first of its entries in page_indices
};

struct AttentionTile {
  int item;   // in tile_items
  int index;  // packed rows from index * kTileRows on
};

struct AttentionWorkHeader {
  int ctas;       // the list is made for
  int num_tiles;  // tiles of one KV head
  int num_streams;
  int requests;  // capacity, see AttentionWork
};

/// Tiles and KV heads, tile-major, are dealt to the CTAs forwards and backwards in turn, because
/// the tiles of a request come with the longest first: the i-th of a CTA.
NF_HOST_DEVICE inline int tile_of_cta(int cta, int i, int ctas) {
  return i * ctas + (i % 2 == 0 ? cta : ctas - 1 - cta);
}

/// The first key that a row sees which ends before key `limit`.
NF_HOST_DEVICE inline int first_key(int limit, int window) {
  return limit > window ? limit - window : 0;
}

/// Where things lie in the work buffer, in bytes. `requests` and `ctas` are capacities.
struct AttentionWork {
  size_t progress;      // [requests * Hkv] int2: steps of a divided item that are done, else 0;
                        // the warp that starts it
  size_t warp_begin;    // [warps + 1] int: the line's range of each warp, in steps of kStreamKeys
  size_t warp_stream;   // [warps] int: the item that holds the first step of its range
  size_t stream_items;  // [requests] AttentionItem
  size_t stream_begin;  // [requests + 1] int: first step of an item's first head; heads follow
  size_t tile_items;    // [requests] AttentionItem
  size_t tiles;         // [rows * group / kTileRows + requests] AttentionTile

  NF_HOST_DEVICE static size_t align(size_t bytes) { return (bytes + 15) / 16 * 16; }

  NF_HOST_DEVICE static AttentionWork of(int requests, int kv_heads, int ctas) {
    const size_t r = requests, warps = static_cast<size_t>(ctas) * kAttentionWarps;
    AttentionWork w;
    w.progress = align(sizeof(AttentionWorkHeader));
    w.warp_begin = w.progress + align(r * kv_heads * 2 * sizeof(int));
    w.warp_stream = w.warp_begin + align((warps + 1) * sizeof(int));
    w.stream_items = w.warp_stream + align(warps * sizeof(int));
    w.stream_begin = w.stream_items + r * sizeof(AttentionItem);
    w.tile_items = w.stream_begin + align((r + 1) * sizeof(int));
    w.tiles = w.tile_items + r * sizeof(AttentionItem);
    return w;
  }
};

struct AttentionPlanArguments {
  const int* segment_requests;
  const int* row_begin;
  const int* row_count;
  const int* kv_len;
  const int* page_indptr;
  int segment_begin, segment_end;
  int requests;  // capacity
  int group;     // Hq / Hkv
  int kv_heads;
  int window;  // or kNoWindow
  int ctas;
  std::byte* work;
  cudaStream_t stream;
};

struct AttentionArguments {
  const void* q;  // [T, Hq * D]
  void* out;      // [T, Hq * D]
  const void* k_cache;
  const void* v_cache;  // [P, Hkv, page_size, D], of k_cache's strides
  const int* page_indices;
  int64_t q_stride, out_stride, page_stride, head_stride, key_stride;  // elements
  int group, kv_heads;
  int page_shift;    // log2(page_size)
  int window;        // the plan's
  float scale_log2;  // scale * log2(e)
  std::byte* work;
  float* partials;  // attention_partial_bytes()
  int ctas;
  cudaStream_t stream;
};

/// Bytes of a work buffer for any batch of these sizes on at most `ctas` CTAs.
size_t attention_work_bytes(int requests, int rows, int group, int kv_heads, int ctas);
/// Scratch for items that ranges divide: two a warp.
size_t attention_partial_bytes(int ctas, int head_dim);

void launch_attention_plan(const AttentionPlanArguments& arguments);
/// dtype is bfloat16 or float16.
void launch_attention_d64(const AttentionArguments& arguments, DType dtype);
void launch_attention_d128(const AttentionArguments& arguments, DType dtype);

}  // namespace nanoflow::cuda
