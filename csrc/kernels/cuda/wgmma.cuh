#pragma once

#include <cstddef>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "kernels/cuda/mma.cuh"

// Products of a warpgroup (Hopper): 64 rows, in registers, 16 of each warp in the fragments of
// mma.cuh, or in shared memory, times a matrix in shared memory. They run on while the warps do
// other things, which must keep off their registers until they have waited for them.

namespace nanoflow::cuda {

/// Along which of its dimensions the matrix's rows of 128 bytes lie: K is the one summed over.
using Major = cute::SM90::GMMA::Major;

/// A matrix of rows of 128 bytes, swizzled as bulk copies do: eight follow one another within 1024
/// bytes, and the next eight lie `eight_rows` bytes further. Where rows hold columns of the
/// product, each further 64 of them lie `next` bytes further.
__device__ inline uint64_t matrix_descriptor(uint32_t address, uint32_t next,
                                             uint32_t eight_rows = 1024) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{eight_rows >> 4} << 32 | uint64_t{next >> 4} << 16 |
         (address & 0x3FFFF) >> 4;
}

template <class T, int kColumns, Major kMajor>
struct WarpgroupProduct;
template <Major kMajor>
struct WarpgroupProduct<__nv_bfloat16, 64, kMajor> {
  using Type = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<Major::K, kMajor>;
};
template <Major kMajor>
struct WarpgroupProduct<__nv_bfloat16, 128, kMajor> {
  using Type = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, kMajor>;
};
template <Major kMajor>
struct WarpgroupProduct<__nv_bfloat16, 256, kMajor> {
  using Type = cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_RS<Major::K, kMajor>;
};
template <Major kMajor>
struct WarpgroupProduct<__half, 64, kMajor> {
  using Type = cute::SM90::GMMA::MMA_64x64x16_F32F16F16_RS<Major::K, kMajor>;
};
template <Major kMajor>
struct WarpgroupProduct<__half, 128, kMajor> {
  using Type = cute::SM90::GMMA::MMA_64x128x16_F32F16F16_RS<Major::K, kMajor>;
};
template <Major kMajor>
struct WarpgroupProduct<__half, 256, kMajor> {
  using Type = cute::SM90::GMMA::MMA_64x256x16_F32F16F16_RS<Major::K, kMajor>;
};

/// Of two matrices in shared memory.
template <class T>
struct SharedProduct;
template <>
struct SharedProduct<__nv_bfloat16> {
  using Type = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::K>;
};
template <>
struct SharedProduct<__half> {
  using Type = cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<Major::K, Major::K>;
};

/// Starts d = a · b, or d += a · b where it `adds`: d [64, 8 kTiles], a [64, 16].
template <class T, Major kMajor, int kTiles>
__device__ __forceinline__ void start_product(float (&d)[kTiles][4], const uint32_t (&a)[4],
                                              uint64_t b, bool adds) {
  using cute::SM90::GMMA::ScaleOut;
  [&]<size_t... I>(std::index_sequence<I...>) {
    WarpgroupProduct<T, 8 * kTiles, kMajor>::Type::fma(
        a[0], a[1], a[2], a[3], b, d[I / 4][I % 4]..., adds ? ScaleOut::One : ScaleOut::Zero);
  }(std::make_index_sequence<4 * kTiles>{});
}

/// The same of two matrices in shared memory, whose rows both hold what is summed over:
/// d [64, 64], a [64, 16].
template <class T>
__device__ __forceinline__ void start_product(float (&d)[8][4], uint64_t a, uint64_t b, bool adds) {
  using cute::SM90::GMMA::ScaleOut;
  [&]<size_t... I>(std::index_sequence<I...>) {
    SharedProduct<T>::Type::fma(a, b, d[I / 4][I % 4]..., adds ? ScaleOut::One : ScaleOut::Zero);
  }(std::make_index_sequence<32>{});
}

/// What the compiler knows of these registers ends here: nothing moves across.
template <class Register, int kTiles>
__device__ __forceinline__ void fence_registers(Register (&r)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) cute::warpgroup_fence_operand(r[n][i]);
  }
}

}  // namespace nanoflow::cuda
