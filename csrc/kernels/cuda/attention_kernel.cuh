#pragma once

#include <algorithm>

#include "kernels/cuda/attention_stream.cuh"
#include "kernels/cuda/check.h"

namespace nanoflow::cuda {

/// Tiles of 128 packed rows, by all warps of a CTA.
template <class T, int D>
struct AttentionTiles {
  static constexpr int kChunks = D / 8;  // 16-byte chunks of a key
  static constexpr int kTileStages = 3;
  static constexpr int kTileBytes = kTileKeys * D * 2;  // of K; V follows
  static constexpr int kSharedBytes = kTileStages * 2 * kTileBytes;

  const AttentionArguments& a;
  AttentionWorkHeader header;
  AttentionWork at;
  uint32_t shared;

  __device__ AttentionTiles(const AttentionArguments& arguments, const AttentionWorkHeader& h,
                            const void* shared_memory)
      : a(arguments),
        header(h),
        at(AttentionWork::of(h.requests, arguments.kv_heads, h.ctas)),
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

  /// Packed rows of one KV head from index * kTileRows on.
  __device__ void run(const AttentionItem& item, int index, int head) const {
    const int visible = item.kv_len - item.row_count + 1;  // to the first row
    const int first = index * kTileRows, base = first + threadIdx.x / 32 * 16;
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
        attend<T, D, kTileKeys>(state, tile_stage(step), tile_stage(step) + kTileBytes, key,
                                {least, most, a.window}, a.scale_log2);
      }
    }
    finish_rows(state, static_cast<T*>(a.out), rows_of(item, head, a.out_stride), base);
    copy_async_wait<0>();
    __syncthreads();  // the ring is free
  }

  /// The tiles of each of the plan's CTAs.
  __device__ void run_all() const {
    const int tiles = header.num_tiles * a.kv_heads;
    for (int cta = blockIdx.x; cta < header.ctas; cta += gridDim.x) {
      for (int i = 0; i * header.ctas < tiles; ++i) {
        const int pair = tile_of_cta(cta, i, header.ctas);
        if (pair >= tiles) continue;
        const AttentionTile tile = list<AttentionTile>(at.tiles)[pair / a.kv_heads];
        run(list<AttentionItem>(at.tile_items)[tile.item], tile.index, pair % a.kv_heads);
      }
    }
  }

  /// What is to be streamed, one item and KV head after the other: for pages that are too small.
  __device__ void run_streams() const {
    for (int i = blockIdx.x; i < header.num_streams * a.kv_heads; i += gridDim.x) {
      run(list<AttentionItem>(at.stream_items)[i / a.kv_heads], 0, i % a.kv_heads);
    }
  }
};

/// The work of each of the plan's CTAs: its tiles, then chunks of streamed keys.
template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    paged_attention(const __grid_constant__ AttentionArguments a,
                    const __grid_constant__ AttentionMaps maps) {
  extern __shared__ __align__(1024) uint4 shared_memory[];
  __shared__ uint64_t barriers[kStreamWarps * AttentionStream<T, D>::kSlots];
  const auto header = *reinterpret_cast<const AttentionWorkHeader*>(a.work);
  const AttentionTiles<T, D> tiled(a, header, shared_memory);
  tiled.run_all();
  if (a.page_shift < kLeastPageShift) {
    tiled.run_streams();
    return;
  }
  if (threadIdx.x / 32 >= kStreamWarps) return;
  const AttentionStream<T, D> streamed(a, maps, header, shared_address(shared_memory),
                                       shared_address(barriers));
  streamed.run_all();
}

template <class T, int D>
void launch_attention(const AttentionArguments& arguments) {
  constexpr int kShared =
      std::max(AttentionTiles<T, D>::kSharedBytes, AttentionStream<T, D>::kSharedBytes);
  NF_CUDA_CHECK(cudaFuncSetAttribute(paged_attention<T, D>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  paged_attention<T, D><<<arguments.ctas, kAttentionThreads, kShared, arguments.stream>>>(
      arguments, make_attention_maps(arguments, D));
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
