#pragma once

#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/check.h"

namespace nanoflow::cuda {

/// kSteps: steps of kStreamKeys keys that a warp holds, with the one it works on, at head_dim 128.
template <class T, int D, int kSteps>
struct AttentionKernel {
  static constexpr int kChunks = D / 8;  // 16-byte chunks of a key
  // Streamed: each warp has its own ring of stages, filled and read by itself.
  static constexpr int kStreamStages = kSteps * 128 / D;
  static constexpr int kStreamBytes = kStreamKeys * D * 2;  // of K; V follows
  static constexpr int kStreamRing = kStreamStages * 2 * kStreamBytes;
  // Tiled: one ring for the CTA.
  static constexpr int kTileStages = 3;
  static constexpr int kTileBytes = kTileKeys * D * 2;  // of K; V follows
  static constexpr int kSharedBytes = kAttentionWarps * kStreamRing > kTileStages * 2 * kTileBytes
                                          ? kAttentionWarps * kStreamRing
                                          : kTileStages * 2 * kTileBytes;
  static constexpr int kPartialFloats = kStreamRows * (D + 2);  // max, sum of each row, then out

  const AttentionArguments& a;
  AttentionWorkHeader header;
  AttentionWork at;
  uint32_t shared;

  __device__ AttentionKernel(const AttentionArguments& arguments, const void* shared_memory)
      : a(arguments),
        header(*reinterpret_cast<const AttentionWorkHeader*>(arguments.work)),
        at(AttentionWork::of(header.requests, arguments.kv_heads, header.ctas)),
        shared(shared_address(shared_memory)) {}

  template <class Element>
  __device__ Element* list(size_t offset) const {
    return reinterpret_cast<Element*>(a.work + offset);
  }

  __device__ PackedRows rows_of(const AttentionItem& item, int head, int64_t stride) const {
    return {item.row_begin * stride + static_cast<int64_t>(head) * a.group * D, stride, a.group,
            item.row_count * a.group};
  }

  __device__ int page_of(const AttentionItem& item, int key) const {
    return key < item.kv_len ? __ldg(a.page_indices + item.page_begin + (key >> a.page_shift)) : 0;
  }

  /// Where a key's K and V are in their caches, in chunks: fits 32 bits up to 64 GiB a layer.
  __device__ uint32_t key_chunk(int page, int head, int key) const {
    const int64_t element = page * a.page_stride + head * a.head_stride +
                            (key & ((1 << a.page_shift) - 1)) * a.key_stride;
    return static_cast<uint32_t>(element >> 3);
  }

  __device__ void copy_chunk(uint32_t k_to, uint32_t v_to, int row, int chunk, uint32_t from,
                             bool valid) const {
    const uint32_t offset = chunk_offset<D>(row, chunk);
    copy_async(k_to + offset, static_cast<const uint4*>(a.k_cache) + from + chunk, valid);
    copy_async(v_to + offset, static_cast<const uint4*>(a.v_cache) + from + chunk, valid);
  }

  // --- tiled requests -----------------------------------------------------------------------

  static constexpr int kTileRowsACopy = kAttentionThreads / kChunks;
  static constexpr int kTileCopies = kTileKeys / kTileRowsACopy;

  __device__ void tile_pages(int (&pages)[kTileCopies], const AttentionItem& item, int step) const {
#pragma unroll
    for (int i = 0; i < kTileCopies; ++i) {
      const int row = i * kTileRowsACopy + threadIdx.x / kChunks;
      pages[i] = page_of(item, step * kTileKeys + row);
    }
  }

  __device__ void copy_tile(const int (&pages)[kTileCopies], const AttentionItem& item, int head,
                            int step, uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < kTileCopies; ++i) {
      const int row = i * kTileRowsACopy + threadIdx.x / kChunks;
      const int key = step * kTileKeys + row;
      copy_chunk(stage, stage + kTileBytes, row, threadIdx.x % kChunks,
                 key_chunk(pages[i], head, key), key < item.kv_len);
    }
  }

  __device__ uint32_t tile_stage(int step) const {
    return shared + step % kTileStages * (2 * kTileBytes);
  }

  /// 128 packed rows of one KV head, by all warps of the CTA.
  __device__ void run_tile(const AttentionTile& tile, int head) const {
    const AttentionItem item = list<AttentionItem>(at.tile_items)[tile.item];
    const int visible = item.kv_len - item.row_count + 1;  // to the first row
    const int first = tile.index * kTileRows, base = first + threadIdx.x / 32 * 16;
    const int last_row = min((first + kTileRows - 1) / a.group, item.row_count - 1);
    const int steps = (visible + last_row + kTileKeys - 1) / kTileKeys;
    const int begin = first_key(visible + first / a.group, a.window) / kTileKeys;
    RowState<T, D> state;
    start_rows(state, static_cast<const T*>(a.q), rows_of(item, head, a.q_stride), base, visible);
    // No row of this warp sees fewer keys than its first, nor more than its last.
    const int most = visible + min((base + 15) / a.group, item.row_count - 1);
    const int least = visible + base / a.group;

    int pages[kTileCopies];
    tile_pages(pages, item, begin);
#pragma unroll
    for (int step = begin; step < begin + kTileStages - 1; ++step) {
      if (step < steps) copy_tile(pages, item, head, step, tile_stage(step));
      copy_async_commit();
      tile_pages(pages, item, step + 1);
    }
    for (int step = begin; step < steps; ++step) {
      copy_async_wait<kTileStages - 2>();
      __syncthreads();  // everybody's copies are there, and the next stage is no longer read
      const int ahead = step + kTileStages - 1;
      if (ahead < steps) copy_tile(pages, item, head, ahead, tile_stage(ahead));
      copy_async_commit();
      tile_pages(pages, item, ahead + 1);
      const int key = step * kTileKeys;
      if (key < most && key + kTileKeys > first_key(least, a.window)) {
        attend<T, D, kTileKeys, true>(state, tile_stage(step), tile_stage(step) + kTileBytes, key,
                                      {least, most, a.window}, a.scale_log2);
      }
    }
    finish_rows(state, static_cast<T*>(a.out), rows_of(item, head, a.out_stride), base);
    copy_async_wait<0>();
    __syncthreads();  // the ring is free
  }

  // --- streamed requests --------------------------------------------------------------------

  /// A place on the line of streamed keys.
  struct Cursor {
    AttentionItem item;
    int stream, head;
    int step, steps;  // of the item and head
    int first_key;    // of step 0

    __device__ bool ends_item() const { return step + 1 == steps; }
  };

  __device__ Cursor cursor_of(int stream, int offset) const {
    Cursor c;
    c.stream = stream;
    c.item = list<AttentionItem>(at.stream_items)[stream];
    c.first_key =
        cuda::first_key(c.item.kv_len - c.item.row_count + 1, a.window) / kStreamKeys * kStreamKeys;
    c.steps = (c.item.kv_len - c.first_key + kStreamKeys - 1) / kStreamKeys;
    c.head = offset / c.steps;
    c.step = offset - c.head * c.steps;
    return c;
  }

  __device__ void advance(Cursor& c) const {
    if (++c.step < c.steps) return;
    c.step = 0;
    if (++c.head < a.kv_heads) return;
    c.head = 0;
    if (++c.stream < header.num_streams) c = cursor_of(c.stream, 0);
  }

  static constexpr int kStreamRowsACopy = 32 / kChunks;
  static constexpr int kStreamCopies = kStreamKeys / kStreamRowsACopy;

  /// The key of a step whose page lane l looks up.
  __device__ int key_of_lane(const Cursor& c, int lane) const {
    return c.first_key + c.step * kStreamKeys + lane % kStreamKeys;
  }

  __device__ void copy_stream(const Cursor& c, int page_of_lane, uint32_t stage, int lane) const {
    const uint32_t chunk_of_lane = key_chunk(page_of_lane, c.head, key_of_lane(c, lane));
#pragma unroll
    for (int i = 0; i < kStreamCopies; ++i) {
      const int row = i * kStreamRowsACopy + lane / kChunks;
      const uint32_t from = __shfl_sync(~0u, chunk_of_lane, row);
      copy_chunk(stage, stage + kStreamBytes, row, lane % kChunks, from,
                 c.first_key + c.step * kStreamKeys + row < c.item.kv_len);
    }
  }

  /// The warp's range of the line, each warp by itself.
  __device__ void run_stream(int warp) const {
    const int lane = threadIdx.x % 32;
    const int* warp_begin = list<int>(at.warp_begin);
    const int begin = warp_begin[warp], end = warp_begin[warp + 1];
    if (begin == end) return;
    const int stream = list<int>(at.warp_stream)[warp];
    Cursor now = cursor_of(stream, begin - list<int>(at.stream_begin)[stream]);
    Cursor ahead = now;
    const uint32_t ring = shared + threadIdx.x / 32 * kStreamRing;
    const auto stage = [&](int i) { return ring + i % kStreamStages * (2 * kStreamBytes); };

    const int count = end - begin;
    int page = page_of(ahead.item, key_of_lane(ahead, lane));
    const auto fetch = [&](int i) {  // step i of the range, and the pages of the next step
      if (i < count) {
        copy_stream(ahead, page, stage(i), lane);
        advance(ahead);
        if (i + 1 < count) page = page_of(ahead.item, key_of_lane(ahead, lane));
      }
      copy_async_commit();
    };
    for (int i = 0; i < kStreamStages - 1; ++i) fetch(i);

    RowState<T, D> state;
    int first_step = now.step;  // of the current item, by this warp
    Limits limits{};
    for (int i = 0; i < count; ++i, advance(now)) {
      if (i == 0 || now.step == 0) {
        first_step = now.step;
        limits = {now.item.kv_len - now.item.row_count + 1, now.item.kv_len, a.window};
        start_rows(state, static_cast<const T*>(a.q), rows_of(now.item, now.head, a.q_stride), 0,
                   limits.least);
      }
      copy_async_wait<kStreamStages - 2>();
      __syncwarp();  // every lane's copies are there, and the next stage is no longer read
      fetch(i + kStreamStages - 1);
      const int key = now.first_key + now.step * kStreamKeys;
      if (now.item.row_count * a.group <= 8) {
        attend<T, D, kStreamKeys, false>(state, stage(i), stage(i) + kStreamBytes, key, limits,
                                         a.scale_log2);
      } else {
        attend<T, D, kStreamKeys, true>(state, stage(i), stage(i) + kStreamBytes, key, limits,
                                        a.scale_log2);
      }
      if (now.ends_item() && first_step == 0) {
        finish_rows(state, static_cast<T*>(a.out), rows_of(now.item, now.head, a.out_stride), 0);
      } else if (now.ends_item() || i + 1 == count) {
        finish_part(state, now, first_step, warp);
      }
    }
    copy_async_wait<0>();
  }

  /// A warp has room for two parts: of the item it starts with, and of the one it ends with.
  __device__ float* partial(int warp, bool starts_item) const {
    return a.partials + (static_cast<int64_t>(warp) * 2 + starts_item) * kPartialFloats;
  }

  /// Stores the part; whoever completes the item merges its parts.
  __device__ void finish_part(const RowState<T, D>& state, const Cursor& c, int first_step,
                              int warp) const {
    const int lane = threadIdx.x % 32;
    float* to = partial(warp, first_step == 0);
    const float sums[2] = {row_sum(state.sum0), row_sum(state.sum1)};
    const float maxima[2] = {state.max0, state.max1};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      if (row >= c.item.row_count * a.group) continue;
      if (lane % 4 == 0) {
        *reinterpret_cast<float2*>(to + 2 * row) = make_float2(maxima[half], sums[half]);
      }
      float* out = to + 2 * kStreamRows + row * D + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2*>(out + 8 * n) =
            make_float2(state.out[n][2 * half], state.out[n][2 * half + 1]);
      }
    }
    int2* progress = list<int2>(at.progress) + c.stream * a.kv_heads + c.head;
    if (lane == 0 && first_step == 0) progress->y = warp;
    __threadfence();
    __syncwarp();
    const int own = c.step + 1 - first_step;
    int done = 0;
    if (lane == 0) done = atomicAdd(&progress->x, own) + own;
    if (__shfl_sync(~0u, done, 0) < c.steps) return;
    __threadfence();
    merge_parts(c, __ldcg(&progress->y));
    if (lane == 0) progress->x = 0;  // for the next layer
  }

  /// Adds up the parts of an item, in the order of its keys; `first` is the warp that starts it.
  __device__ void merge_parts(const Cursor& c, int first) const {
    const int lane = threadIdx.x % 32;
    const int* warp_begin = list<int>(at.warp_begin);
    const int end = list<int>(at.stream_begin)[c.stream] + (c.head + 1) * c.steps;
    const PackedRows rows = rows_of(c.item, c.head, a.out_stride);
    constexpr int kOwn = D / 32;    // columns of a lane
    constexpr int kMergedRows = 4;  // at a time, so that their loads overlap
    for (int base = 0; base < rows.count; base += kMergedRows) {
      float max[kMergedRows], sum[kMergedRows] = {}, out[kMergedRows][kOwn] = {};
#pragma unroll
      for (int r = 0; r < kMergedRows; ++r) max[r] = -INFINITY;
      for (int warp = first; warp_begin[warp] < end; ++warp) {
        if (warp_begin[warp] == warp_begin[warp + 1]) continue;
        const float* part = partial(warp, warp == first);
        float2 stats[kMergedRows];
        float values[kMergedRows][kOwn];
#pragma unroll
        for (int r = 0; r < kMergedRows; ++r) {  // rows past the count hold anything
          stats[r] = __ldcg(reinterpret_cast<const float2*>(part + 2 * (base + r)));
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            values[r][i] = __ldcg(part + 2 * kStreamRows + (base + r) * D + i * 32 + lane);
          }
        }
#pragma unroll
        for (int r = 0; r < kMergedRows; ++r) {
          const float new_max = fmaxf(max[r], stats[r].x);
          const float keep = exp2_approx((max[r] - shift_of(new_max)) * a.scale_log2);
          const float add = exp2_approx((stats[r].x - shift_of(new_max)) * a.scale_log2);
          sum[r] = sum[r] * keep + stats[r].y * add;
#pragma unroll
          for (int i = 0; i < kOwn; ++i) out[r][i] = out[r][i] * keep + values[r][i] * add;
          max[r] = new_max;
        }
      }
#pragma unroll
      for (int r = 0; r < kMergedRows; ++r) {
        if (base + r >= rows.count) break;
        T* to = static_cast<T*>(a.out) + rows.element(base + r, D);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) to[i * 32 + lane] = static_cast<T>(out[r][i] / sum[r]);
      }
    }
  }
};

/// The work of each of the plan's CTAs: its tiles, then its share of the streamed keys.
template <class T, int D, int kSteps>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    paged_attention(const __grid_constant__ AttentionArguments a) {
  extern __shared__ uint4 shared_memory[];
  const AttentionKernel<T, D, kSteps> kernel(a, shared_memory);
  for (int cta = blockIdx.x; cta < kernel.header.ctas; cta += gridDim.x) {
    const int ctas = kernel.header.ctas, tiles = kernel.header.num_tiles * a.kv_heads;
    for (int i = 0; i * ctas < tiles; ++i) {
      const int at = tile_of_cta(cta, i, ctas);
      if (at >= tiles) continue;
      kernel.run_tile(kernel.template list<AttentionTile>(kernel.at.tiles)[at / a.kv_heads],
                      at % a.kv_heads);
    }
    kernel.run_stream(cta * kAttentionWarps + threadIdx.x / 32);
    __syncthreads();  // the rings are free
  }
}

template <class T, int D, int kSteps>
void launch_attention_steps(const AttentionArguments& arguments) {
  constexpr int kShared = AttentionKernel<T, D, kSteps>::kSharedBytes;
  NF_CUDA_CHECK(cudaFuncSetAttribute(paged_attention<T, D, kSteps>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  paged_attention<T, D, kSteps>
      <<<arguments.ctas, kAttentionThreads, kShared, arguments.stream>>>(arguments);
  NF_CUDA_CHECK(cudaGetLastError());
}

/// A few SMs need many bytes on their way each. On many SMs as many would queue up at the memory,
/// which then lets some SMs run far ahead of others.
inline constexpr int kFewCtas = 56;

template <class T, int D>
void launch_attention(const AttentionArguments& arguments) {
  if (arguments.ctas <= kFewCtas) {
    launch_attention_steps<T, D, 3>(arguments);
  } else {
    launch_attention_steps<T, D, 2>(arguments);
  }
}

}  // namespace nanoflow::cuda
