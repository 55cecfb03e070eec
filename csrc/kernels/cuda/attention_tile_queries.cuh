#pragma once

#include "kernels/cuda/attention_tile_ring.cuh"
#include "kernels/cuda/wgmma.cuh"

// The queries of a warpgroup, 64 packed rows, and their products with a step's keys. They are held
// in registers, or stay in shared memory where registers have no room for them.

namespace nanoflow::cuda {

inline constexpr int kGroupThreads = 128;  // of a warpgroup
inline constexpr int kBothBarrier = 1;     // of both warpgroups; each has one of its own after it

/// By all threads of a warpgroup.
__device__ inline void meet_group(int group) {
  sync_threads(kBothBarrier + 1 + group, kGroupThreads);
}

using TileScores = float[kTileKeys / 8][4];

template <class T, int D>
struct HeldQueries {
  using Ring = TileRing<D>;
  uint32_t fragments[D / 16][4];

  /// Takes the queries that have come.
  __device__ void take(const Ring& ring) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row = ring.queries() + (warp * 16 + lane % 16) * Ring::kQueryPitch;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) load_matrices(fragments[k], row + k * 32 + lane / 16 * 16);
    arrive(shared_address(&ring.shared.queries_empty));
  }

  /// Before the first product.
  __device__ void fence() { fence_registers(fragments); }

  __device__ __forceinline__ void start_scores(TileScores& s, uint32_t keys) const {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      start_product<T, Major::K>(s, fragments[k],
                                 matrix_descriptor(keys + k / 4 * Ring::kHalfBytes + k % 4 * 32, 0),
                                 k > 0);
    }
    cute::warpgroup_commit_batch();
  }

  /// When all products are done.
  __device__ void leave(const Ring&) const {}
};

/// They come row by row, and are swizzled where they lie: eight rows follow one another as 128
/// bytes of each, half after half.
template <class T, int D>
struct SharedQueries {
  using Ring = TileRing<D>;
  static constexpr int kRows = 16;  // of a warp
  static constexpr int kEightRows = 8 * Ring::kQueryPitch, kHalf = 8 * Ring::kRowBytes;
  static_assert(Ring::kQueryPitch == 32 * 16, "a piece of each row for a lane");
  uint32_t rows;  // of the warpgroup

  __device__ void take(const Ring& ring) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const uint32_t own = ring.queries() + warp * kRows * Ring::kQueryPitch;
    uint4 pieces[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      pieces[row] = load_shared(own + row * Ring::kQueryPitch + lane * 16);
    }
    __syncwarp();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      store_shared(own + row / 8 * kEightRows + lane / 8 * kHalf + row % 8 * Ring::kRowBytes +
                       ((lane % 8 ^ row % 8) << 4),
                   pieces[row]);
    }
    fence_for_async_reads();
    meet_group(group);
    rows = ring.queries() + group * (kTileRows / 2) * Ring::kQueryPitch;
  }

  __device__ void fence() const {}

  __device__ __forceinline__ void start_scores(TileScores& s, uint32_t keys) const {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      start_product<T>(s, matrix_descriptor(rows + k / 4 * kHalf + k % 4 * 32, 0, kEightRows),
                       matrix_descriptor(keys + k / 4 * Ring::kHalfBytes + k % 4 * 32, 0), k > 0);
    }
    cute::warpgroup_commit_batch();
  }

  __device__ void leave(const Ring& ring) const {
    arrive(shared_address(&ring.shared.queries_empty));
  }
};

}  // namespace nanoflow::cuda
