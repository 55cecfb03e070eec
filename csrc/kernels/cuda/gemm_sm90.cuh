#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "core/error.h"
#include "kernels/cuda/gemm_epilogue.cuh"
#include "kernels/cuda/gemm_sm90.h"

namespace nanoflow::cuda {

// Warp-specialised kernels: a producer warp fills shared memory by TMA, two consumer warpgroups
// multiply. A persistent grid takes the tiles in turn.
struct Cooperative {  // both warpgroups share a tile
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};
struct Pingpong {  // each has its own tile: one's epilogue runs beside the other's products
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};
struct StreamK : Cooperative {  // the last wave's products are dealt out evenly, along K
  using Scheduler = cutlass::gemm::StreamKScheduler;
};

// CTAs that run side by side and share what they load.
using Alone = cute::Shape<cute::_1, cute::_1, cute::_1>;
using PairOfRows = cute::Shape<cute::_2, cute::_1, cute::_1>;     // the same features
using PairOfColumns = cute::Shape<cute::_1, cute::_2, cute::_1>;  // the same tokens

/// What a kernel's tiles are multiplied with.
template <class X, class Out, int kTileM, int kTileN, int kTileK, class Cluster, class Policy,
          Rows kRows>
struct GemmParts {
  static constexpr bool kTransposed = kRows == Rows::kFeatures;
  using KMajorA = cutlass::layout::RowMajor;
  using KMajorB = cutlass::layout::ColumnMajor;
  using OutStride = cutlass::gemm::TagToStrideC_t<
      std::conditional_t<kTransposed, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>>;
  using Tile = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kTileK>>;
  static constexpr int kAlign = 16 / sizeof(X);
  using EpilogueStorage =
      typename GemmEpilogue<Out, OutStride, kRows, Combine::kStore>::SharedStorage;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, X, KMajorA, kAlign, X, KMajorB, kAlign,
      float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(EpilogueStorage))>,
      typename Policy::Mainloop>::CollectiveOp;
};

/// Of a matrix whose rows are contiguous, and of matrices that lie behind each other.
template <class Stride>
Stride stride_of(int64_t row_stride, int64_t matrix_stride = 0) {
  Stride stride{};  // one of its first two modes is the static 1 of the contiguous dimension
  if constexpr (cute::is_static_v<cute::tuple_element_t<0, Stride>>) {
    cute::get<1>(stride) = row_stride;
  } else {
    cute::get<0>(stride) = row_stride;
  }
  cute::get<2>(stride) = matrix_stride;
  return stride;
}

inline void check(cutlass::Status status, const GemmArguments& a, const char* what) {
  NF_CHECK(status == cutlass::Status::kSuccess, "gemm: cannot ", what, " for T=", a.shape.rows,
           " N=", a.shape.features, " K=", a.shape.depth, " on ", a.sms,
           " SMs: ", cutlass::cutlassGetStatusString(status));
}

/// Enqueues a kernel; `a` is what its arguments were made from.
template <class Device>
void launch_device(const typename Device::Arguments& arguments, const GemmArguments& a) {
  check(Device::can_implement(arguments), a, "use this kernel");
  const size_t needed = Device::get_workspace_size(arguments);
  NF_CHECK(needed <= a.workspace_bytes, "gemm: T=", a.shape.rows, " N=", a.shape.features,
           " K=", a.shape.depth, " needs ", needed, " bytes of workspace, the lane has ",
           a.workspace_bytes);
  Device device;
  check(device.initialize(arguments, a.workspace, a.stream), a, "prepare the kernel");
  check(device.run(a.stream), a, "launch the kernel");
}

template <class X, class Out, int kTileM, int kTileN, int kTileK, class Cluster, class Policy,
          Rows kRows = Rows::kTokens, Combine kCombine = Combine::kStore>
struct GemmSm90 {
  using Parts = GemmParts<X, Out, kTileM, kTileN, kTileK, Cluster, Policy, kRows>;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      GemmEpilogue<Out, typename Parts::OutStride, kRows, kCombine>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>,
                                                      typename Parts::Mainloop, Epilogue,
                                                      typename Policy::Scheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Device::Arguments arguments_of(const GemmArguments& a) {
    constexpr bool kTransposed = Parts::kTransposed;
    cutlass::KernelHardwareInfo hardware;
    hardware.device_id = 0;  // of the current context; with sm_count given, nothing asks for it
    hardware.sm_count = a.sms;
    const void* left = kTransposed ? a.weight : a.x;
    const void* right = kTransposed ? a.x : a.weight;
    const int64_t left_stride = kTransposed ? a.weight_stride : a.x_stride;
    const int64_t right_stride = kTransposed ? a.x_stride : a.weight_stride;
    const int m = kTransposed ? a.shape.features : a.shape.rows;
    const int n = kTransposed ? a.shape.rows : a.shape.features;
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, a.shape.depth, 1},
        {static_cast<const X*>(left), stride_of<typename Kernel::StrideA>(left_stride),
         static_cast<const X*>(right), stride_of<typename Kernel::StrideB>(right_stride)},
        {.out = static_cast<Out*>(a.out),
         .out_stride = a.out_stride,
         .bias = static_cast<const Out*>(a.bias),
         .accumulate = a.accumulate,
         .is_gelu = a.is_gelu},
        hardware};
    if constexpr (cute::is_same_v<typename Policy::Scheduler, cutlass::gemm::StreamKScheduler>) {
      using Mode = decltype(arguments.scheduler.decomposition_mode);
      arguments.scheduler.decomposition_mode = Mode::StreamK;
    }
    return arguments;
  }

  static void launch(const GemmArguments& a) { launch_device<Device>(arguments_of(a), a); }
};

}  // namespace nanoflow::cuda
