#include "kernels/cuda/attention.h"
#include "kernels/cuda/check.h"

namespace nanoflow::cuda {
namespace {

constexpr int kThreads = 1024;
/// Times of a CTA for a tile as such and for each kTileKeys of its keys, in that for kStreamKeys
/// streamed keys (at an SM's share of the memory bandwidth).
constexpr int kTileCost = 4, kTileStepCost = 3;
/// Chunks of less than this many steps are not worth the merging.
constexpr int kMinSteps = 2;
/// Tiles are ordered by their steps, up to so many.
constexpr int kTileSteps = 1023;
constexpr int kMaxOwnedChunks = kMaxAttentionCtas * kStreamWarps;
/// One step in so many is shared: more than the warps' ends are apart.
constexpr int kSharedPart = 8;

__device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// What comes before a request, or the total, of each list.
struct Counts {
  int streams, steps, items, tiles;

  __device__ Counts operator+(const Counts& o) const {
    return {streams + o.streams, steps + o.steps, items + o.items, tiles + o.tiles};
  }
};

__device__ Counts shuffle_up(const Counts& c, int delta) {
  return {__shfl_up_sync(~0u, c.streams, delta), __shfl_up_sync(~0u, c.steps, delta),
          __shfl_up_sync(~0u, c.items, delta), __shfl_up_sync(~0u, c.tiles, delta)};
}

/// Exclusive sums over the block's threads; `total` is the sum of all.
__device__ Counts block_scan(const Counts& own, Counts* warp_sums, Counts& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Counts inclusive = own;
  for (int delta = 1; delta < 32; delta *= 2) {
    const Counts before = shuffle_up(inclusive, delta);
    if (lane >= delta) inclusive = inclusive + before;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  Counts before{};
  total = {};
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) before = total;
    total = total + warp_sums[w];
  }
  __syncthreads();
  return {before.streams + inclusive.streams - own.streams,
          before.steps + inclusive.steps - own.steps, before.items + inclusive.items - own.items,
          before.tiles + inclusive.tiles - own.tiles};
}

/// Replaces counts by the sums of those before them. Runs in one warp.
__device__ void sum_before(int* counts, int size) {
  const int lane = threadIdx.x;
  int before = 0;
  for (int base = 0; base < size; base += 32) {
    const int own = base + lane < size ? counts[base + lane] : 0;
    int inclusive = own;
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = __shfl_up_sync(~0u, inclusive, delta);
      if (lane >= delta) inclusive += other;
    }
    if (base + lane < size) counts[base + lane] = before + inclusive - own;
    before += __shfl_sync(~0u, inclusive, 31);
  }
}

struct Lists {
  int2* progress;
  int* chunk_begin;
  int* chunk_stream;
  AttentionItem* stream_items;
  int* stream_begin;
  AttentionItem* tile_items;
  AttentionTile* tiles;

  __device__ Lists(std::byte* work, const AttentionWork& at)
      : progress(reinterpret_cast<int2*>(work + at.progress)),
        chunk_begin(reinterpret_cast<int*>(work + at.chunk_begin)),
        chunk_stream(reinterpret_cast<int*>(work + at.chunk_stream)),
        stream_items(reinterpret_cast<AttentionItem*>(work + at.stream_items)),
        stream_begin(reinterpret_cast<int*>(work + at.stream_begin)),
        tile_items(reinterpret_cast<AttentionItem*>(work + at.tile_items)),
        tiles(reinterpret_cast<AttentionTile*>(work + at.tiles)) {}
};

/// Sorts the requests into the two lists; returns their sizes.
__device__ Counts list_requests(const AttentionPlanArguments& a, const Lists& lists,
                                Counts* warp_sums) {
  const int first = a.segment_requests[a.segment_begin];
  const int last = a.segment_requests[a.segment_end];
  Counts done{};
  for (int base = first; base < last; base += kThreads) {
    const int r = base + static_cast<int>(threadIdx.x);
    AttentionItem item{};
    Counts own{};
    if (r < last) {
      item = {a.row_begin[r], a.row_count[r], a.kv_len[r], a.page_indptr[r]};
      if (item.row_count == 1 && a.group <= kStreamHeads && !a.tiles_all) {
        own.streams = 1;
        own.steps =
            ceil_div(item.kv_len, kStreamKeys) - first_key(item.kv_len, a.window) / kStreamKeys;
      } else if (item.row_count > 0) {
        own.items = 1;
        own.tiles = ceil_div(item.row_count * a.group, kTileRows);
      }
    }
    Counts total;
    const Counts at = done + block_scan(own, warp_sums, total);
    if (own.streams > 0) {
      lists.stream_items[at.streams] = item;
      lists.stream_begin[at.streams] = at.steps;
    }
    if (own.items > 0) lists.tile_items[at.items] = item;
    for (int i = 0; i < own.tiles; ++i) lists.tiles[at.tiles + i] = {at.items, i};
    done = done + total;
  }
  if (threadIdx.x == 0) lists.stream_begin[done.streams] = done.steps;
  for (int i = threadIdx.x; i < done.streams * a.kv_heads; i += kThreads) lists.progress[i].x = 0;
  return done;
}

/// Steps of a tile, up to what its place in the order depends on.
__device__ int steps_of(const AttentionPlanArguments& a, const Lists& lists,
                        const AttentionTile& tile) {
  const TileSpan span = span_of(lists.tile_items[tile.item], tile.index, a.group, a.window);
  return min(span.end - span.begin, kTileSteps);
}

/// Puts the tiles of most steps first. Those of equal steps come in any order: they cost the same.
__device__ void sort_tiles(const AttentionPlanArguments& a, const Lists& lists, int num_tiles,
                           int* places) {
  if (num_tiles < 2) return;
  AttentionTile* const sorted = lists.tiles + num_tiles;  // the list has room for twice the tiles
  for (int i = threadIdx.x; i <= kTileSteps; i += kThreads) places[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < num_tiles; i += kThreads) {
    atomicAdd(&places[kTileSteps - steps_of(a, lists, lists.tiles[i])], 1);
  }
  __syncthreads();
  if (threadIdx.x < 32) sum_before(places, kTileSteps + 1);
  __syncthreads();
  for (int i = threadIdx.x; i < num_tiles; i += kThreads) {
    const AttentionTile tile = lists.tiles[i];
    sorted[atomicAdd(&places[kTileSteps - steps_of(a, lists, tile)], 1)] = tile;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_tiles; i += kThreads) lists.tiles[i] = sorted[i];
  __syncthreads();
}

/// Adds up what the tiles cost each CTA, in steps.
__device__ void add_tile_costs(const AttentionPlanArguments& a, const Lists& lists, int num_tiles,
                               int* costs) {
  const int rounds = ceil_div(num_tiles * a.kv_heads, a.ctas);
  for (int i = threadIdx.x; i < rounds * a.ctas; i += kThreads) {
    const int cta = i % a.ctas, at = tile_of_cta(cta, i / a.ctas, a.ctas) / a.kv_heads;
    if (at >= num_tiles) continue;
    atomicAdd(&costs[cta], kTileCost + kTileStepCost * steps_of(a, lists, lists.tiles[at]));
  }
}

/// What CTAs do beside a chunk of theirs, in steps of the warps that own it.
__device__ int cost_of_chunk(const AttentionPlanArguments& a, const int* costs, int chunk) {
  const int first = chunk * a.kv_heads / kStreamWarps;
  const int last = ((chunk + 1) * a.kv_heads - 1) / kStreamWarps;
  int cost = 0;
  for (int cta = first; cta <= min(last, a.ctas - 1); ++cta) cost = max(cost, costs[cta]);
  return ceil_div(cost, kStreamWarps);
}

/// Turns the chunks' costs into shares of the line: what each lacks to the level that uses up all
/// steps. Runs in one warp.
__device__ void level_costs(int* costs, int chunks, int steps) {
  const int lane = threadIdx.x;
  int low = 0, high = 0;
  for (int c = lane; c < chunks; c += 32) high = max(high, costs[c]);
  high = __reduce_max_sync(~0u, high) + steps;
  while (low < high) {
    const int level = low + (high - low) / 2;
    int sum = 0;
    for (int c = lane; c < chunks; c += 32) sum += min(max(level - costs[c], 0), steps);
    if (__reduce_add_sync(~0u, sum) >= steps) {
      high = level;
    } else {
      low = level + 1;
    }
  }
  for (int c = lane; c < chunks; c += 32) costs[c] = max(low - costs[c], 0);
}

/// The item whose steps hold `step`.
__device__ int stream_of(const Lists& lists, int num_streams, int step) {
  int low = 0, high = num_streams;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (lists.stream_begin[middle] <= step ? low : high) = middle;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) plan_attention(AttentionPlanArguments a) {
  __shared__ Counts warp_sums[kThreads / 32];
  __shared__ int costs[kMaxAttentionCtas];
  __shared__ int shares[kMaxOwnedChunks];
  __shared__ int begins[kMaxOwnedChunks];
  const Lists lists(a.work, AttentionWork::of(a.requests, a.kv_heads, a.ctas));
  for (int c = threadIdx.x; c < a.ctas; c += kThreads) costs[c] = 0;
  const Counts counts = list_requests(a, lists, warp_sums);
  __syncthreads();
  sort_tiles(a, lists, counts.tiles, begins);
  add_tile_costs(a, lists, counts.tiles, costs);
  __syncthreads();
  const int owned_chunks = AttentionWork::owned_chunks(a.ctas, a.kv_heads);
  const int shared = counts.steps / kSharedPart, owned = counts.steps - shared;
  const int shared_size = max(kMinSteps, ceil_div(shared, kSharedChunks * owned_chunks));
  const int chunks = owned_chunks + ceil_div(shared, shared_size);
  for (int c = threadIdx.x; c < owned_chunks; c += kThreads) shares[c] = cost_of_chunk(a, costs, c);
  __syncthreads();
  if (threadIdx.x < 32) level_costs(shares, owned_chunks, owned);
  __syncthreads();
  if (threadIdx.x == 0) {
    int begin = 0;
    for (int c = 0; c < owned_chunks; ++c) {
      begins[c] = begin;
      begin = min(begin + shares[c], owned);
    }
    *reinterpret_cast<AttentionWorkHeader*>(a.work) = {.ctas = a.ctas,
                                                       .num_tiles = counts.tiles,
                                                       .num_streams = counts.streams,
                                                       .num_owned_chunks = owned_chunks,
                                                       .num_chunks = chunks,
                                                       .requests = a.requests,
                                                       .taken = 0};
  }
  __syncthreads();
  const int unit = counts.steps < 16 * kMinSteps * owned_chunks ? kMinSteps : 1;
  for (int c = threadIdx.x; c <= chunks; c += kThreads) {
    int begin = counts.steps;
    if (c < owned_chunks) {
      begin = begins[c] / unit * unit;
    } else if (c < chunks) {
      begin = owned + (c - owned_chunks) * shared_size;
    }
    lists.chunk_begin[c] = begin;
    if (c < chunks) lists.chunk_stream[c] = stream_of(lists, counts.streams, begin);
  }
}

}  // namespace

void launch_attention_plan(const AttentionPlanArguments& arguments) {
  plan_attention<<<1, kThreads, 0, arguments.stream>>>(arguments);
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
