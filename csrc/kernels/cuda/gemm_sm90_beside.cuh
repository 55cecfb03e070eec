#pragma once

#include <algorithm>

#include "kernels/cuda/gemm_sm90.cuh"
#include "kernels/cuda/launch.h"

// Products that leave room on their SMs for a CTA that streams keys (attention_beside.cuh): fewer
// stages than shared memory would hold, and registers that all threads have at the start only so
// many of.

namespace nanoflow::cuda {

// A quarter of an SM has 512 registers a lane: for three warps of these, and one that streams.
inline constexpr int kBesideRegisters = 120;  // of a thread at the start
inline constexpr int kBesideCopyRegisters = 24, kBesideSumRegisters = 168;
inline constexpr int kBesideTileK = 64;

/// CUTLASS's mainloop of a cluster of two CTAs, with kStages stages. Two narrow products instead of
/// a wide one: a wide one's sums could not be named with the registers of the start.
template <class X, int kTileN, int kStages>
struct BesideMainloop {
  using Operands =
      GemmParts<X, X, 128, kTileN, kBesideTileK, PairOfRows, Cooperative, Rows::kTokens>;
  using Built = typename Operands::Mainloop;
  static constexpr int kProductN = kTileN > 128 ? kTileN / 2 : kTileN;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          X, X, float, cute::Shape<cute::_128, cute::Int<kProductN>, cute::Int<kBesideTileK>>,
          cute::GMMA::Major::K, cute::GMMA::Major::K>(),
      cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
  using Type = cutlass::gemm::collective::CollectiveMma<
      cutlass::gemm::MainloopSm90TmaGmmaWarpSpecialized<
          kStages, PairOfRows, cutlass::gemm::KernelTmaWarpSpecializedCooperative>,
      typename Operands::Tile, X, typename Built::StrideA, X, typename Built::StrideB, Mma,
      typename Built::GmemTiledCopyA, typename Built::SmemLayoutAtomA,
      typename Built::SmemCopyAtomA, cute::identity, typename Built::GmemTiledCopyB,
      typename Built::SmemLayoutAtomB, typename Built::SmemCopyAtomB, cute::identity>;
};

template <class X, int kTileN, int kStages, Combine kCombine>
struct GemmSm90Beside {
  using Operands = typename BesideMainloop<X, kTileN, kStages>::Operands;
  using Mainloop = typename BesideMainloop<X, kTileN, kStages>::Type;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using Epilogue = GemmEpilogue<X, typename Operands::OutStride, Rows::kTokens, kCombine>;
  using Problem = cute::Shape<int, int, int, int>;

  static constexpr int kTileM = 128, kPair = 2;
  static constexpr int kWarpgroup = 128;
  static constexpr int kSumThreads = 2 * kWarpgroup;
  static constexpr int kThreads = kWarpgroup + kSumThreads;  // the first copy

  struct Params {
    typename Mainloop::Params mainloop;
    typename Epilogue::Params epilogue;
    Problem problem;
    int m_pairs, pairs;  // of tiles
    int steps;           // of K
  };

  struct SharedStorage {
    typename Mainloop::TensorStorage tensors;
    typename Mainloop::PipelineStorage pipeline;
  };

  /// Counts through the steps of K.
  struct Step {
    int at;
    CUTLASS_DEVICE int operator*() const { return at; }
    CUTLASS_DEVICE Step& operator++() {
      ++at;
      return *this;
    }
  };

  CUTLASS_DEVICE static Pipeline make_pipeline(const Params& params, SharedStorage& shared) {
    typename Pipeline::Params pipeline;
    pipeline.role = threadIdx.x < kWarpgroup ? Pipeline::ThreadCategory::Producer
                                             : Pipeline::ThreadCategory::Consumer;
    pipeline.is_leader = threadIdx.x == 0;
    pipeline.num_consumers = kSumThreads;
    pipeline.transaction_bytes = params.mainloop.tma_transaction_bytes;
    return Pipeline(shared.pipeline, pipeline, PairOfRows{});
  }

  /// Calls with the coordinates of each of the CTA's tiles.
  template <class Fn>
  CUTLASS_DEVICE static void for_tiles(const Params& params, Fn&& fn) {
    const int rank = static_cast<int>(cute::block_rank_in_cluster());
    for (int i = blockIdx.x / kPair; i < params.pairs; i += gridDim.x / kPair) {
      fn(i % params.m_pairs * kPair + rank, i / params.m_pairs);
    }
  }

  CUTLASS_DEVICE static void copy_tiles(const Params& params, SharedStorage& shared,
                                        Pipeline pipeline) {
    if (threadIdx.x >= cutlass::NumThreadsPerWarp) return;
    auto state = cutlass::make_producer_start_state<Pipeline>();
    Mainloop mainloop;
    const auto inputs = mainloop.load_init(params.problem, params.mainloop);
    for_tiles(params, [&](int m, int n) {
      mainloop.load(params.mainloop, pipeline, state, inputs, cute::make_coord(m, n, cute::_, 0),
                    Step{0}, params.steps, threadIdx.x, cute::block_rank_in_cluster(),
                    shared.tensors);
      state.advance(params.steps);
    });
    mainloop.load_tail(pipeline, state);  // the other CTA of the pair has done with this one's
  }

  CUTLASS_DEVICE static void multiply_tiles(const Params& params, SharedStorage& shared,
                                            Pipeline pipeline) {
    typename Mainloop::PipelineState state;
    typename Mainloop::TiledMma mma;
    Mainloop mainloop;
    const Epilogue epilogue(params.epilogue);
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
    const auto tile = typename Operands::Tile{};
    for_tiles(params, [&](int m, int n) {
      auto sums = cute::partition_fragment_C(mma, cute::take<0, 2>(tile));
      mainloop.mma(pipeline, state, sums, params.steps, thread, shared.tensors, params.mainloop);
      mainloop.mma_tail(pipeline, state, params.steps);
      state.advance(params.steps);
      epilogue(params.problem, tile, cute::make_coord(m, n, 0, 0), sums, mma, 0, thread, nullptr);
    });
  }

  static Params params_of(const GemmArguments& a) {
    const auto ceil_div = [](int size, int by) { return (size + by - 1) / by; };
    const Problem problem{a.shape.rows, a.shape.features, a.shape.depth, 1};
    const typename Mainloop::Arguments mainloop{
        static_cast<const X*>(a.x), stride_of<typename Mainloop::StrideA>(a.x_stride),
        static_cast<const X*>(a.weight), stride_of<typename Mainloop::StrideB>(a.weight_stride)};
    const typename Epilogue::Arguments epilogue{.out = static_cast<X*>(a.out),
                                                .out_stride = a.out_stride,
                                                .bias = static_cast<const X*>(a.bias),
                                                .accumulate = a.accumulate,
                                                .is_gelu = a.is_gelu};
    NF_CHECK(
        Mainloop::can_implement(problem, mainloop) && Epilogue::can_implement(problem, epilogue),
        "gemm: cannot use this kernel for T=", a.shape.rows, " N=", a.shape.features,
        " K=", a.shape.depth);
    const int m_pairs = ceil_div(a.shape.rows, kTileM * kPair);
    return {.mainloop = Mainloop::to_underlying_arguments(problem, mainloop, nullptr),
            .epilogue = epilogue,
            .problem = problem,
            .m_pairs = m_pairs,
            .pairs = m_pairs * ceil_div(a.shape.features, kTileN),
            .steps = ceil_div(a.shape.depth, kBesideTileK)};
  }

  static void launch(const GemmArguments& a);
};

template <class Gemm>
__global__ void __maxnreg__(kBesideRegisters)
    multiply_beside(const __grid_constant__ typename Gemm::Params params) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename Gemm::SharedStorage*>(memory);
  if (threadIdx.x == 0) Gemm::Mainloop::prefetch_tma_descriptors(params.mainloop);
  const auto pipeline = Gemm::make_pipeline(params, shared);
  cute::cluster_sync();  // the pipelines' barriers are there
  if (threadIdx.x < Gemm::kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<kBesideCopyRegisters>();
    Gemm::copy_tiles(params, shared, pipeline);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kBesideSumRegisters>();
    Gemm::multiply_tiles(params, shared, pipeline);
  }
}

template <class X, int kTileN, int kStages, Combine kCombine>
void GemmSm90Beside<X, kTileN, kStages, kCombine>::launch(const GemmArguments& a) {
  const Params params = params_of(a);
  const int pairs = std::clamp(a.sms / kPair, 1, params.pairs);
  launch_beside(multiply_beside<GemmSm90Beside>,
                {.grid = pairs * kPair,
                 .threads = kThreads,
                 .shared_bytes = sizeof(SharedStorage),
                 .cluster = kPair,
                 .stream = a.stream},
                params);
}

}  // namespace nanoflow::cuda
