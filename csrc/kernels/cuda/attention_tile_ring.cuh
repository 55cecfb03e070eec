#pragma once

#include "kernels/cuda/attention_maps.h"
#include "kernels/cuda/attention_rows.cuh"
#include "kernels/cuda/bulk_copy.cuh"

// What goes to and fro between the warp of a CTA that copies for tiles and those that multiply: a
// ring of slots, of 64 keys or their values in turn, and room for the queries of one tile.

namespace nanoflow::cuda {

inline constexpr int kMaxTileSlots = 10;

struct TileJob {
  AttentionItem item;
  int index;  // of the tile; -1 when there are no more
  int head;   // KV head
};

struct TileShared {
  uint64_t full[kMaxTileSlots], empty[kMaxTileSlots];  // barriers
  uint64_t queries_full, queries_empty;                // of the job, too
  TileJob job;
  uint32_t not_finite[2][kTileWarps];  // see TileProducts::keys_not_finite
};

/// Where a slot holds a key's half, 64 dimensions (of a large head: its quarter): halves follow one
/// another, 128 bytes of each key, whose pieces of 16 bytes are swizzled.
template <int D>
struct TileRing {
  /// Registers cannot hold the queries of large heads beside their outputs.
  static constexpr bool kQueriesStay = D > 128;
  static constexpr int kSlots = kQueriesStay ? 5 : kMaxTileSlots;
  static constexpr int kHalves = D / 64;
  static constexpr int kRowBytes = 128;
  static constexpr int kHalfBytes = kTileKeys * kRowBytes;
  static constexpr int kSlotBytes = kHalves * kHalfBytes;
  /// Where they are read by columns, eight rows fall into different banks.
  static constexpr int kQueryPitch = D * 2 + (kQueriesStay ? 0 : 16);
  static constexpr int kSharedBytes = kSlots * kSlotBytes + kTileRows * kQueryPitch;
  static_assert(kSharedBytes + 1024 + sizeof(TileShared) <= 227 * 1024, "what a CTA may have");

  TileShared& shared;
  uint32_t slots;  // kSharedBytes at a multiple of 1024

  __device__ uint32_t slot(int fill) const { return slots + fill % kSlots * kSlotBytes; }
  __device__ static uint32_t piece(int key, int half, int i) {
    return half * kHalfBytes + key * kRowBytes + ((i ^ key % 8) << 4);
  }
  __device__ uint32_t queries() const { return slots + kSlots * kSlotBytes; }

  __device__ void wait_full(int fill) const {
    wait_barrier(shared_address(&shared.full[fill % kSlots]), fill / kSlots % 2);
  }
  __device__ void wait_empty(int fill) const {
    wait_barrier(shared_address(&shared.empty[fill % kSlots]), fill / kSlots % 2 ^ 1);
  }
  __device__ uint32_t full(int fill) const { return shared_address(&shared.full[fill % kSlots]); }
  /// By every warp that multiplies, when it has done with the slot.
  __device__ void release(int fill) const {
    if (threadIdx.x % 32 == 0) arrive(shared_address(&shared.empty[fill % kSlots]));
  }

  /// By one thread, before all others.
  __device__ void init_barriers() const {
    for (int i = 0; i < kSlots; ++i) {
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
