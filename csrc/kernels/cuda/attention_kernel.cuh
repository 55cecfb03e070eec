#pragma once

#include <algorithm>

#include "kernels/cuda/attention_beside.cuh"
#include "kernels/cuda/attention_tile_copies.cuh"
#include "kernels/cuda/attention_tile_products.cuh"
#include "kernels/cuda/launch.h"

namespace nanoflow::cuda {

// All threads of a CTA could not have the registers that products need: copies give up most of
// theirs.
inline constexpr int kProductRegisters = 224, kCopyRegisters = 56;
// The same of a CTA that leaves room for one that streams.
inline constexpr int kBesideTileRegisters = 128;
inline constexpr int kBesideProductRegisters = 176, kBesideCopyRegisters = 24;

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

/// The tiles of each of the plan's CTAs. By all of a CTA's threads; those that multiply return when
/// all of them have done, with true, and those that copy at once.
template <class T, int D, int kProducts, int kCopies>
__device__ bool run_tiles(const AttentionArguments& a, const AttentionMaps& maps,
                          const AttentionWorkHeader& header, const TileRing<D>& ring) {
  const bool has_tiles = header.num_tiles > 0 || !can_stream(D, a.page_shift);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (has_tiles) {
    if (threadIdx.x == 0) ring.init_barriers();
    __syncthreads();
  }
  if (warp >= kTileWarps) {
    keep_registers<kCopies>();
    if (has_tiles && warp == kTileWarps) TileCopies<T, D>(a, maps, header, ring).run_all();
    return false;
  }
  take_registers<kProducts>();
  if (has_tiles) {
    TileProducts<T, D>(a, ring).run_all();
    meet_tile_warps();  // the shared memory is free
  }
  return true;
}

/// Tiles, then chunks of streamed keys.
template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    paged_attention(const __grid_constant__ AttentionArguments a,
                    const __grid_constant__ AttentionMaps maps) {
  extern __shared__ __align__(1024) uint4 shared_memory[];
  __shared__ TileShared tile_shared;
  const auto header = *reinterpret_cast<const AttentionWorkHeader*>(a.work);
  const TileRing<D> ring{tile_shared, shared_address(shared_memory)};
  if (!run_tiles<T, D, kProductRegisters, kCopyRegisters>(a, maps, header, ring)) return;
  if constexpr (D <= kMaxStreamDim) {
    using Stream = AttentionStream<MmaSteps<T, D>>;
    __shared__ uint64_t barriers[kStreamWarps * Stream::kSlots];
    if (!can_stream(D, a.page_shift) || threadIdx.x / 32 >= kStreamWarps) return;
    const Stream stream(a, maps, header, shared_address(shared_memory), shared_address(barriers));
    stream.run_all();
  }
}

/// Tiles alone, beside a CTA on the same SM that streams for others.
template <class T, int D>
__global__ void __maxnreg__(kBesideTileRegisters)
    tile_attention(const __grid_constant__ AttentionArguments a,
                   const __grid_constant__ AttentionMaps maps) {
  extern __shared__ __align__(1024) uint4 shared_memory[];
  __shared__ TileShared tile_shared;
  const auto header = *reinterpret_cast<const AttentionWorkHeader*>(a.work);
  const TileRing<D> ring{tile_shared, shared_address(shared_memory)};
  run_tiles<T, D, kBesideProductRegisters, kBesideCopyRegisters>(a, maps, header, ring);
}

/// Dynamic shared memory: tiles and streams take it in turn.
template <class T, int D>
constexpr int shared_bytes() {
  if constexpr (D > kMaxStreamDim) return TileRing<D>::kSharedBytes;
  return std::max(TileRing<D>::kSharedBytes,
                  kStreamWarps * AttentionStream<MmaSteps<T, D>>::kRingBytes);
}

template <class T, int D>
void launch_attention(const AttentionArguments& arguments) {
  const bool is_decode = arguments.part == AttentionPart::kDecode;
  if (is_decode && !can_stream(D, arguments.page_shift)) return;  // all are tiles
  const bool is_beside = is_decode && arguments.is_beside;
  const AttentionMaps maps = make_attention_maps(arguments, D, is_beside ? 1 : D / 64);
  LaunchShape shape{
      .grid = arguments.ctas, .threads = kAttentionThreads, .stream = arguments.stream};
  if constexpr (D <= kMaxStreamDim) {
    if (is_beside) {
      shape.threads = 32 * kBesideWarps;
      shape.shared_bytes = sizeof(typename AttentionBeside<T, D>::Shared);
      return launch_beside(stream_beside<T, D>, shape, arguments, maps);
    }
    if (is_decode) {
      shape.threads = 32 * kStreamWarps;
      shape.shared_bytes = kStreamWarps * AttentionStream<MmaSteps<T, D>>::kRingBytes;
      return launch_beside(stream_attention<T, D>, shape, arguments, maps);
    }
    if (arguments.part == AttentionPart::kPrefill) {
      shape.shared_bytes = TileRing<D>::kSharedBytes;
      return launch_beside(tile_attention<T, D>, shape, arguments, maps);
    }
  }
  shape.shared_bytes = shared_bytes<T, D>();
  launch_beside(paged_attention<T, D>, shape, arguments, maps);
}

}  // namespace nanoflow::cuda
