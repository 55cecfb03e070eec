#pragma once

#include <algorithm>

#include "kernels/cuda/attention_stream.cuh"
#include "kernels/cuda/attention_tile_copies.cuh"
#include "kernels/cuda/attention_tile_products.cuh"
#include "kernels/cuda/check.h"

namespace nanoflow::cuda {

/// Tiles, by all warps of a CTA.
template <class T, int D>
__device__ void run_tiles(const AttentionArguments& a, const AttentionMaps& maps,
                          const AttentionWorkHeader& header, const TileRing<D>& ring) {
  if (threadIdx.x == 0) ring.init_barriers();
  __syncthreads();
  if (threadIdx.x / 32 < kTileWarps) {
    TileProducts<T, D>(a, ring).run_all();
  } else {
    TileCopies<T, D>(a, maps, header, ring).run_all();
  }
  __syncthreads();  // the shared memory is free
}

/// For kAttentionThreads of a CTA that has an SM to itself. Launch bounds would count the warp that
/// copies as a warpgroup, and leave the products too few.
inline constexpr int kAttentionRegisters = 224;

/// The work of each of the plan's CTAs: its tiles, then chunks of streamed keys.
template <class T, int D>
__global__ void __maxnreg__(kAttentionRegisters)
    paged_attention(const __grid_constant__ AttentionArguments a,
                    const __grid_constant__ AttentionMaps maps) {
  extern __shared__ __align__(1024) uint4 shared_memory[];
  __shared__ uint64_t barriers[kStreamWarps * AttentionStream<T, D>::kSlots];
  __shared__ TileShared tile_shared;
  const auto header = *reinterpret_cast<const AttentionWorkHeader*>(a.work);
  const bool streams = a.page_shift >= kLeastPageShift;
  if (header.num_tiles > 0 || !streams) {
    run_tiles<T, D>(a, maps, header, {tile_shared, shared_address(shared_memory)});
  }
  if (!streams || threadIdx.x / 32 >= kStreamWarps) return;
  const AttentionStream<T, D> streamed(a, maps, header, shared_address(shared_memory),
                                       shared_address(barriers));
  streamed.run_all();
}

template <class T, int D>
void launch_attention(const AttentionArguments& arguments) {
  constexpr int kShared = std::max(TileRing<D>::kSharedBytes, AttentionStream<T, D>::kSharedBytes);
  NF_CUDA_CHECK(cudaFuncSetAttribute(paged_attention<T, D>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  paged_attention<T, D><<<arguments.ctas, kAttentionThreads, kShared, arguments.stream>>>(
      arguments, make_attention_maps(arguments, D));
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
