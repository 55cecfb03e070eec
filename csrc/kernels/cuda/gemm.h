#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "core/dtype.h"

// Which matrix kernel a product runs on: a pure choice, without CUDA.

namespace nanoflow::cuda {

/// out[T, N] = x[T, K] · weight[N, K]ᵀ
struct GemmShape {
  int rows;      // T
  int features;  // N
  int depth;     // K
};

/// Which kernels can compute a product.
struct GemmType {
  DType x, out;
  bool is_silu_mul = false;  // GemmSiluMul, of N rows of gate and up
};

/// Kernels that are compiled in, by their tile of rows × features. Cooperative: two warpgroups
/// share a tile; ping-pong: each has its own.
enum class GemmKernel : uint8_t {
  k128x256,         // cooperative: the least energy per product
  k128x192,         // cooperative
  k128x128,         // ping-pong
  k128x256StreamK,  // the last wave dealt out along K
  k128x128StreamK,
  k64x128StreamK,  // few rows: features are the tensor cores' rows
  k16x128StreamK,
  k128x64,         // cooperative
  k128x96Pair,     // cooperative; two CTAs share what they load of the features
  k128x160,        // cooperative: whole waves on 104 SMs where 128x192 and 128x256 leave many idle
  k128x128Halves,  // a cluster's two CTAs multiply half of K each: fills SMs that tiles leave idle
  // As those above, but two tiles of a cluster share their rows, not their features: an odd number
  // of tiles along the rows leaves none of them empty. For products that have all SMs.
  k128x256Columns,
  k128x192Columns,
  k128x160Columns,
  k128x144,  // cooperative, as the next: whole waves on 116 SMs
  k128x224,
};
inline constexpr int kNumGemmKernels = 16;

/// What the choice knows of a kernel.
struct GemmTraits {
  std::string_view name;
  int tile_rows, tile_features;
  int cluster_rows, cluster_features;  // tiles that run side by side and share operands
  bool is_stream_k;
  bool is_general;  // exists for every type of product, not only of bfloat16 into bfloat16
  int k_parts = 1;  // of K, multiplied side by side by the CTAs of a cluster
};

const GemmTraits& traits_of(GemmKernel kernel);

/// The kernel that is expected to be fastest on `sms` SMs, among those that exist for the type.
GemmKernel choose_gemm(const GemmShape& shape, int sms, const GemmType& type);

/// The kernel of every product where no row's sums may depend on how many rows there are: it exists
/// for all types, and adds along K in one order.
inline constexpr GemmKernel kInvariantGemm = GemmKernel::k128x128;

/// The time of the choice's model under sustained load, in microseconds: good for comparing
/// kernels.
double gemm_time_us(GemmKernel kernel, const GemmShape& shape, int sms);

}  // namespace nanoflow::cuda
