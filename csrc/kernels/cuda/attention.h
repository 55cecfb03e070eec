#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

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
// A request with one row, whose KV heads serve at most 8 query heads each, is *streamed*: its keys
// pass by one warp for each KV head, 32 at a time. The keys of all such requests lie end to end on
// one line that is cut into chunks: first as many as there are warps for its KV heads, all equal
// but for what else the warps' CTAs do, then small ones that warps take when they have done theirs.
// The KV heads of a chunk belong to neighbouring warps, so that a CTA reads whole pages. Items that
// a cut divides leave partial results, and the warp that finishes last merges them, in the order of
// the keys.
//
// Other requests are *tiled*, and all of them where heads are larger than kMaxStreamDim, or where
// no row's result may depend on the batch: cuts of the line do, while a tile takes a row's keys in
// one order, kTileKeys at a time from a multiple of it on, whatever rows it has and wherever a
// prompt was cut. The query heads of a KV head are packed: a request with n rows has n * Hq / Hkv
// packed rows, token-major. A CTA takes 128 of them: two warpgroups multiply, 64 rows each, and one
// warp copies for them, 64 keys at a time and as far ahead as there is room.

namespace nanoflow::cuda {

inline constexpr int kTileWarps = 8;    // of a CTA: two warpgroups; one more warp copies for them
inline constexpr int kStreamWarps = 7;  // of them; shared memory has room for no more
inline constexpr int kLeastPageShift = 3;  // log2 of the least page size for streaming
inline constexpr int kMaxStreamDim = 128;  // shared memory has no room for slots of larger heads
inline constexpr int kStreamHeads = 8;     // query heads of a streamed KV head, at most
inline constexpr int kStreamKeys = 32;     // keys a warp takes at a time
inline constexpr int kSharedChunks = 2;    // shared chunks for each that has an owner, at most
inline constexpr int kTileRows = 128;      // packed rows of a tile
inline constexpr int kTileKeys = 64;       // keys a CTA takes at a time
inline constexpr int kAttentionThreads = 32 * (kTileWarps + 4);  // the copies' is a warpgroup, too
inline constexpr int kMaxAttentionCtas = 256;                    // a plan is made for at most
inline constexpr int kNoWindow = 1 << 30;                        // keys that a row sees at most

/// Whether decodes can be streamed. Where not, what a plan lists to be streamed is tiled.
NF_HOST_DEVICE constexpr bool can_stream(int head_dim, int page_shift) {
  return head_dim <= kMaxStreamDim && page_shift >= kLeastPageShift;
}

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
  int num_owned_chunks, num_chunks;  // those with owners come first
  int requests;                      // capacity, see AttentionWork
  int taken;                         // shared chunks' heads, by the launch that runs
};

/// Tiles and KV heads, tile-major, are dealt to the CTAs forwards and backwards in turn, because
/// the longest tiles come first: the i-th of a CTA.
NF_HOST_DEVICE inline int tile_of_cta(int cta, int i, int ctas) {
  return i * ctas + (i % 2 == 0 ? cta : ctas - 1 - cta);
}

/// The first key that a row sees which ends before key `limit`.
NF_HOST_DEVICE inline int first_key(int limit, int window) {
  return limit > window ? limit - window : 0;
}

/// The keys of a tile, in steps of kTileKeys.
struct TileSpan {
  int least, most;  // keys that its first row sees, and its last, counted from the request's first
  int begin, end;   // steps
};

NF_HOST_DEVICE inline TileSpan span_of(const AttentionItem& item, int index, int group,
                                       int window) {
  const int visible = item.kv_len - item.row_count + 1;  // to the request's first row
  const int first = index * kTileRows / group, past = (index + 1) * kTileRows - 1;
  const int last = past < item.row_count * group ? past / group : item.row_count - 1;
  return {.least = visible + first,
          .most = visible + last,
          .begin = first_key(visible + first, window) / kTileKeys,
          .end = (visible + last + kTileKeys - 1) / kTileKeys};
}

/// Where things lie in the work buffer, in bytes. `requests` and `ctas` are capacities.
struct AttentionWork {
  size_t progress;      // [requests * Hkv] int2: steps of a divided item that are done, else 0;
                        // the chunk that starts it
  size_t chunk_begin;   // [chunks + 1] int: where on the line, in steps of kStreamKeys
  size_t chunk_stream;  // [chunks] int: the item that holds its first step
  size_t stream_items;  // [requests] AttentionItem
  size_t stream_begin;  // [requests + 1] int: an item's first step
  size_t tile_items;    // [requests] AttentionItem
  size_t tiles;         // [2 * (rows * group / kTileRows + requests)] AttentionTile: the second
                        // half is the plan's own

  NF_HOST_DEVICE static int owned_chunks(int ctas, int kv_heads) {
    const int chunks = ctas * kStreamWarps / kv_heads;
    return chunks > 0 ? chunks : 1;
  }
  NF_HOST_DEVICE static size_t align(size_t bytes) { return (bytes + 15) / 16 * 16; }

  NF_HOST_DEVICE static AttentionWork of(int requests, int kv_heads, int ctas) {
    const size_t r = requests;
    const auto chunks = static_cast<size_t>(owned_chunks(ctas, kv_heads)) * (1 + kSharedChunks);
    AttentionWork w;
    w.progress = align(sizeof(AttentionWorkHeader));
    w.chunk_begin = w.progress + align(r * kv_heads * 2 * sizeof(int));
    w.chunk_stream = w.chunk_begin + align((chunks + 1) * sizeof(int));
    w.stream_items = w.chunk_stream + align(chunks * sizeof(int));
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
  bool tiles_all;  // streams nothing
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
  int pages;         // of the cache
  int window;        // the plan's
  float scale_log2;  // scale * log2(e)
  std::byte* work;
  float* partials;  // attention_partial_bytes()
  int ctas;
  cudaStream_t stream;
};

/// Bytes of a work buffer for any batch of these sizes on at most `ctas` CTAs.
size_t attention_work_bytes(int requests, int rows, int group, int kv_heads, int ctas);
/// Scratch for streamed items that cuts divide: two parts for each chunk and KV head.
size_t attention_partial_bytes(int ctas, int kv_heads, int head_dim);

void launch_attention_plan(const AttentionPlanArguments& arguments);

/// dtype is bfloat16 or float16.
void launch_attention_d64(const AttentionArguments& arguments, DType dtype);
void launch_attention_d128(const AttentionArguments& arguments, DType dtype);
void launch_attention_d256(const AttentionArguments& arguments, DType dtype);

using AttentionLauncher = void (*)(const AttentionArguments& arguments, DType dtype);
/// The one for a head_dim; null where there is none.
AttentionLauncher attention_launcher(int head_dim);
/// Why there is none for a head_dim; empty where there is.
std::string head_dim_problem(int head_dim);

}  // namespace nanoflow::cuda
