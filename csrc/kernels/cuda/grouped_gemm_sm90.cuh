#pragma once

#include "kernels/cuda/gemm_sm90.cuh"
#include "kernels/cuda/grouped_gemm_sm90.h"

// CUTLASS's cooperative kernel over the rows of several experts. How many rows each of them has is
// device data: the scheduler deals out tiles by the offsets that it reads, the mainloop and the
// epilogue move from where a tile is counted, inside its expert's rows, to where it lies. What a
// tile loads behind its expert's last row belongs to the next one and is not stored.

namespace nanoflow::cuda {

template <Rows kRows>
struct ExpertScheduler {};  // a tag: names ExpertTileScheduler to CUTLASS

/// Deals all tiles of one expert after another to the CTAs in turn; those with the same features
/// lie together, so that the weights are read once.
template <class Tile, Rows kRows>
class ExpertTileScheduler : public cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90 {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
  static constexpr bool kIsTransposed = kRows == Rows::kFeatures;
  static constexpr int kTileTokens = cute::size<kIsTransposed ? 1 : 0>(Tile{});
  static constexpr int kTileFeatures = cute::size<kIsTransposed ? 0 : 1>(Tile{});

 public:
  struct Experts {
    const int32_t* offsets = nullptr;  // [count + 1]
    int count = 0, features = 0;
  };
  struct Arguments : Base::Arguments {
    Experts experts;
  };
  struct Params : Base::Params {
    Experts experts;
  };

  template <class Problem, class TileShape, class Cluster>
  static Params to_underlying_arguments(const Problem&, TileShape, Cluster,
                                        const cutlass::KernelHardwareInfo&,
                                        const Arguments& arguments, void* = nullptr, uint32_t = 1) {
    Params params;
    params.experts = arguments.experts;
    return params;
  }

  /// Which CTAs find a tile is known on the device only.
  template <class Problem, class TileShape, class Cluster>
  static dim3 get_grid_shape(const Params&, const Problem&, TileShape, Cluster,
                             const cutlass::KernelHardwareInfo& hardware, const Arguments&) {
    return dim3(hardware.sm_count);
  }

  CUTLASS_DEVICE explicit ExpertTileScheduler(const Params& params)
      : experts_(params.experts), tile_(static_cast<int>(blockIdx.x)) {}

  template <class Cluster>
  CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(Cluster) {
    return find_tile();
  }
  CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo) {
    tile_ += static_cast<int>(gridDim.x);
    return cute::make_tuple(find_tile(), true);
  }
  template <class Pipeline, class State>
  CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo tile, Pipeline&, State) {
    return fetch_next_work(tile);
  }
  /// A hint for kernels that start early, which ours do not.
  CUTLASS_DEVICE bool is_last_tile(WorkTileInfo&) const { return false; }

 private:
  CUTLASS_DEVICE WorkTileInfo find_tile() {
    const int feature_tiles = (experts_.features + kTileFeatures - 1) / kTileFeatures;
    for (; expert_ < experts_.count; ++expert_) {
      const int rows = experts_.offsets[expert_ + 1] - experts_.offsets[expert_];
      const int token_tiles = (rows + kTileTokens - 1) / kTileTokens;
      const int own = tile_ - first_tile_;
      if (own < token_tiles * feature_tiles) {
        const int token = own % token_tiles, feature = own / token_tiles;
        return {kIsTransposed ? feature : token, kIsTransposed ? token : feature, expert_, true};
      }
      first_tile_ += token_tiles * feature_tiles;
    }
    return WorkTileInfo::invalid_work_tile();
  }

  Experts experts_;
  int tile_;
  int expert_ = 0, first_tile_ = 0;  // the expert looked at, and its first tile
};

/// A mainloop whose tokens begin at the expert's first row; the tensor of tokens has no experts.
template <class Base, Rows kRows>
struct ExpertMainloop : Base {
  struct Arguments : Base::Arguments {
    const int32_t* offsets;
  };
  struct Params : Base::Params {
    const int32_t* offsets;
  };

  template <class Problem>
  static Params to_underlying_arguments(const Problem& problem, const Arguments& arguments,
                                        void* workspace) {
    return {Base::to_underlying_arguments(problem, arguments, workspace), arguments.offsets};
  }

  template <class Left, class Right, class Coord, class Depths>
  CUTLASS_DEVICE void load(const Params& params, typename Base::MainloopPipeline pipeline,
                           typename Base::PipelineState write,
                           const cute::tuple<Left, Right>& inputs, const Coord& coord,
                           Depths depths, int depth_count, int thread, uint32_t rank,
                           typename Base::TensorStorage& storage) {
    using namespace cute;
    const int expert = get<3>(coord);
    // inputs: (tile rows, tile depth, tiles of rows, tiles of depth, experts)
    const auto shift = make_coord(params.offsets[expert], _0{}, _0{}, _0{}, -expert);
    const auto load_from = [&](const auto& moved) {
      Base::load(params, pipeline, write, moved, coord, depths, depth_count, thread, rank, storage);
    };
    if constexpr (kRows == Rows::kFeatures) {
      load_from(make_tuple(get<0>(inputs), domain_offset(shift, get<1>(inputs))));
    } else {
      load_from(make_tuple(domain_offset(shift, get<0>(inputs)), get<1>(inputs)));
    }
  }
};

/// An epilogue whose tokens are the expert's rows of out.
template <class Out, class Stride, Rows kRows, Combine kCombine>
class ExpertEpilogue : public GemmEpilogue<Out, Stride, kRows, kCombine> {
  using Base = GemmEpilogue<Out, Stride, kRows, kCombine>;

 public:
  struct Arguments {
    Out* out;
    int64_t out_stride;
    const int32_t* offsets;
  };
  using Params = Arguments;

  template <class Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Problem>
  static bool can_implement(const Problem& problem, const Arguments&) {
    return Base::can_implement(problem, typename Base::Arguments{});
  }

  CUTLASS_HOST_DEVICE explicit ExpertEpilogue(const Params& params)
      : Base(typename Base::Params{}), params_(params) {}

  template <class Problem, class Tile, class Coord, class Sums, class TiledMma, class Residue>
  CUTLASS_DEVICE void operator()(Problem problem, Tile tile, Coord coord, const Sums& sums,
                                 TiledMma mma, Residue residue, int thread, char* memory) const {
    const int expert = cute::get<3>(coord);
    const int begin = params_.offsets[expert];
    cute::get<kRows == Rows::kFeatures ? 1 : 0>(problem) = params_.offsets[expert + 1] - begin;
    const Base own(typename Base::Params{.out = params_.out + begin * params_.out_stride,
                                         .out_stride = params_.out_stride,
                                         .bias = nullptr,
                                         .accumulate = false});
    own(problem, tile, coord, sums, mma, residue, thread, memory);
  }

 private:
  Params params_;
};

template <class X, int kTileM, int kTileN, int kTileK, Rows kRows, Combine kCombine>
struct GroupedGemmSm90 {
  using Single = GemmParts<X, X, kTileM, kTileN, kTileK, Alone, Cooperative, kRows>;
  using Mainloop = ExpertMainloop<typename Single::Mainloop, kRows>;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      ExpertEpilogue<X, typename Single::OutStride, kRows, kCombine>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, ExpertScheduler<kRows>>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Device::Arguments arguments_of(const GroupedGemmArguments& a) {
    using StrideA = typename Kernel::StrideA;
    using StrideB = typename Kernel::StrideB;
    constexpr bool kTransposed = Single::kTransposed;
    const GemmArguments& all = a.all;
    const auto* x = static_cast<const X*>(all.x);
    const auto* weight = static_cast<const X*>(all.weight);
    // x is never looked at beyond its first "expert", whose rows are all there are.
    const int64_t left_row = kTransposed ? all.weight_stride : all.x_stride;
    const int64_t right_row = kTransposed ? all.x_stride : all.weight_stride;
    const int64_t left_expert = kTransposed ? a.expert_stride : all.x_stride;
    const int64_t right_expert = kTransposed ? all.x_stride : a.expert_stride;
    const int m = kTransposed ? all.shape.features : all.shape.rows;
    const int n = kTransposed ? all.shape.rows : all.shape.features;
    typename Device::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = cute::make_shape(m, n, all.shape.depth, a.experts);
    arguments.mainloop.ptr_A = kTransposed ? weight : x;
    arguments.mainloop.dA = stride_of<StrideA>(left_row, left_expert);
    arguments.mainloop.ptr_B = kTransposed ? x : weight;
    arguments.mainloop.dB = stride_of<StrideB>(right_row, right_expert);
    arguments.mainloop.offsets = a.offsets;
    arguments.epilogue = {
        .out = static_cast<X*>(all.out), .out_stride = all.out_stride, .offsets = a.offsets};
    arguments.hw_info.device_id = 0;  // of the current context; with sm_count nothing asks for it
    arguments.hw_info.sm_count = all.sms;
    arguments.scheduler.experts = {
        .offsets = a.offsets, .count = a.experts, .features = all.shape.features};
    return arguments;
  }

  static void launch(const GroupedGemmArguments& a) {
    launch_device<Device>(arguments_of(a), a.all);
  }
};

/// Few rows for an expert: features are the tensor cores' rows, and what counts is that all weights
/// are read once.
template <class X, Combine kCombine>
void launch_grouped(const GroupedGemmArguments& a) {
  constexpr int kFewRows = 64;
  if (!a.batch_invariant && a.all.shape.rows <= kFewRows * a.experts) {
    GroupedGemmSm90<X, 128, kFewRows, 128, Rows::kFeatures, kCombine>::launch(a);
  } else {
    GroupedGemmSm90<X, 128, 256, 64, Rows::kTokens, kCombine>::launch(a);
  }
}

}  // namespace nanoflow::cuda

namespace cutlass::gemm::kernel::detail {

template <nanoflow::cuda::Rows kRows, class Tile, class Cluster, uint32_t kStages>
struct TileSchedulerSelector<nanoflow::cuda::ExpertScheduler<kRows>, arch::Sm90, Tile, Cluster,
                             kStages> {
  static_assert(cute::size(Cluster{}) == 1, "tiles are dealt out one by one");
  using Scheduler = nanoflow::cuda::ExpertTileScheduler<Tile, kRows>;
};

}  // namespace cutlass::gemm::kernel::detail
