#pragma once

#include "kernels/cuda/attention_maps.h"
#include "kernels/cuda/attention_rows.cuh"
#include "kernels/cuda/bulk_copy.cuh"

// What goes to and fro between the warp of a CTA that copies for tiles and those that multiply: a
// ring of slots, of 64 keys or their values in turn, and room for the queries of one tile.

namespace nanoflow::cuda {

inline constexpr int kTileSlots = 10;

struct TileJob {
  AttentionItem item;
  int index;  // of the tile; -1 when there are no more
  int head;   // KV head
};

struct TileShared {
  uint64_t full[kTileSlots], empty[kTileSlots];  // barriers
  uint64_t queries_full, queries_empty;          // of the job, too
  TileJob job;
  uint32_t not_finite[2][kTileWarps];  // see TileProducts::keys_not_finite
};

/// Where a slot holds a key's half, 64 dimensions: halves follow one another, 128 bytes of each
/// key, whose pieces of 16 bytes are swizzled.
template <int D>
struct TileRing {
  static constexpr int kHalves = D / 64;
  static constexpr int kRowBytes = 128;
  static constexpr int kHalfBytes = kTileKeys * kRowBytes;
  static constexpr int kSlotBytes = kHalves * kHalfBytes;
  static constexpr int kQueryPitch = D * 2 + 16;  // eight rows fall into different banks
  static constexpr int kSharedBytes = kTileSlots * kSlotBytes + kTileRows * kQueryPitch;

  TileShared& shared;
  uint32_t slots;  // kSharedBytes at a multiple of 1024

  __device__ uint32_t slot(int fill) const { return slots + fill % kTileSlots * kSlotBytes; }
  __device__ static uint32_t piece(int key, int half, int i) {
    return half * kHalfBytes + key * kRowBytes + ((i ^ key % 8) << 4);
  }
  __device__ uint32_t queries() const { return slots + kTileSlots * kSlotBytes; }

  __device__ void wait_full(int fill) const {
    wait_barrier(shared_address(&shared.full[fill % kTileSlots]), fill / kTileSlots % 2);
  }
  __device__ void wait_empty(int fill) const {
    wait_barrier(shared_address(&shared.empty[fill % kTileSlots]), fill / kTileSlots % 2 ^ 1);
  }
  __device__ uint32_t full(int fill) const {
    return shared_address(&shared.full[fill % kTileSlots]);
  }
  /// By every warp that multiplies, when it has done with the slot.
  __device__ void release(int fill) const {
    if (threadIdx.x % 32 == 0) arrive(shared_address(&shared.empty[fill % kTileSlots]));
  }

  /// By one thread, before all others.
  __device__ void init_barriers() const {
    for (int i = 0; i < kTileSlots; ++i) {
      init_barrier(shared_address(&shared.full[i]), 1);
      init_barrier(shared_address(&shared.empty[i]), kTileWarps);
    }
    init_barrier(shared_address(&shared.queries_full), 1);
    init_barrier(shared_address(&shared.queries_empty), 32 * kTileWarps);
    fence_for_bulk_copies();
  }
};

__device__ inline PackedRows rows_of(const AttentionArguments& a, const TileJob& job,
                                     int64_t stride, int head_dim) {
  return {job.item.row_begin * stride + static_cast<int64_t>(job.head) * a.group * head_dim, stride,
          a.group, job.item.row_count * a.group};
}

}  // namespace nanoflow::cuda
