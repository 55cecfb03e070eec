#pragma once

#include <algorithm>

#include "kernels/cuda/attention_stream.cuh"
#include "kernels/cuda/attention_tile_copies.cuh"
#include "kernels/cuda/attention_tile_products.cuh"
#include "kernels/cuda/check.h"

namespace nanoflow::cuda {

// All threads of a CTA could not have the registers that products need: copies give up most of
// theirs.
inline constexpr int kProductRegisters = 224, kCopyRegisters = 56;

template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ inline void meet_tile_warps() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kTileWarps) : "memory");
}

/// The work of each of the plan's CTAs: its tiles, then chunks of streamed keys.
template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    paged_attention(const __grid_constant__ AttentionArguments a,
                    const __grid_constant__ AttentionMaps maps) {
  extern __shared__ __align__(1024) uint4 shared_memory[];
  __shared__ TileShared tile_shared;
  const auto header = *reinterpret_cast<const AttentionWorkHeader*>(a.work);
  const TileRing<D> ring{tile_shared, shared_address(shared_memory)};
  const bool streams = can_stream(D, a.page_shift);
  const bool has_tiles = header.num_tiles > 0 || !streams;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (has_tiles) {
    if (threadIdx.x == 0) ring.init_barriers();
    __syncthreads();
  }
  if (warp >= kTileWarps) {
    keep_registers<kCopyRegisters>();
    if (has_tiles && warp == kTileWarps) TileCopies<T, D>(a, maps, header, ring).run_all();
    return;
  }
  take_registers<kProductRegisters>();
  if (has_tiles) {
    TileProducts<T, D>(a, ring).run_all();
    meet_tile_warps();  // the shared memory is free
  }
  if constexpr (D <= kMaxStreamDim) {
    __shared__ uint64_t barriers[kStreamWarps * AttentionStream<T, D>::kSlots];
    if (!streams || warp >= kStreamWarps) return;
    const AttentionStream<T, D> streamed(a, maps, header, shared_address(shared_memory),
                                         shared_address(barriers));
    streamed.run_all();
  }
}

/// Dynamic shared memory: tiles and streams take it in turn.
template <class T, int D>
constexpr int shared_bytes() {
  if constexpr (D > kMaxStreamDim) return TileRing<D>::kSharedBytes;
  return std::max(TileRing<D>::kSharedBytes, AttentionStream<T, D>::kSharedBytes);
}

template <class T, int D>
void launch_attention(const AttentionArguments& arguments) {
  constexpr int kShared = shared_bytes<T, D>();
  NF_CUDA_CHECK(cudaFuncSetAttribute(paged_attention<T, D>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  paged_attention<T, D><<<arguments.ctas, kAttentionThreads, kShared, arguments.stream>>>(
      arguments, make_attention_maps(arguments, D));
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
