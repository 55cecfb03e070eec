#pragma once

#include <algorithm>

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm_sm90.cuh"

// Products with too few tiles for the SMs. The CTAs of a cluster take a part of K each of the same
// tile. Then every one of them gives away, by way of the others' shared memory, all its sums but
// those of its own slice of the tile's columns, and finishes that slice: nothing passes through
// global memory, no CTA waits for another that need not be running, and sums are added in one
// order.

namespace nanoflow::cuda {

/// What a CTA does with its tile's sums once it has multiplied its part of K.
template <class X, int kTileN, int kParts>
struct SumExchange {
  static constexpr int kThreads = 256;         // that hold sums
  static constexpr int kSums = kTileN / 2;     // of a thread
  static constexpr int kOwn = kSums / kParts;  // of those, in a slice
  static constexpr int kFours = kOwn / 4;
  static_assert(kTileN / kParts % 32 == 0, "slices are stored in pieces of 4 x 8 columns");

  /// Slices of the others; thread by thread, so that a warp's accesses lie together.
  using Storage = float4[kParts - 1][kFours][kThreads];

  using SliceTile = cute::Shape<cute::_128, cute::Int<kTileN / kParts>, cute::_64>;
  /// Leaves the sums of a slice where the whole tile's product leaves them.
  using SliceMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<X, X, float, SliceTile, cute::GMMA::Major::K,
                                 cute::GMMA::Major::K>(),
      cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));

  /// To the others' shared memory, which none of them uses at that time.
  template <class Sums>
  CUTLASS_DEVICE static void give(const Sums& sums, Storage& storage, int rank, int thread) {
    static_assert(decltype(cute::size(sums))::value == kSums);
    CUTLASS_PRAGMA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if (part == rank) continue;
      const int sender = rank - (rank > part);
      const uint32_t to = cute::set_block_rank(
          cute::cast_smem_ptr_to_uint(&storage[sender][0][thread]), static_cast<uint32_t>(part));
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kFours; ++i) {
        const int first = part * kOwn + 4 * i;
        asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                         to + i * kThreads * static_cast<int>(sizeof(float4))),
                     "f"(sums(first)), "f"(sums(first + 1)), "f"(sums(first + 2)),
                     "f"(sums(first + 3))
                     : "memory");
      }
    }
  }

  /// The thread's own slice of its sums, and what the others gave, in the order of their ranks.
  template <class Sums, class Slice>
  CUTLASS_DEVICE static void take(const Sums& sums, const Storage& storage, int rank, int thread,
                                  Slice& slice) {
    static_assert(decltype(cute::size(slice))::value == kOwn);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      slice(i) = sums(i);
      CUTLASS_PRAGMA_UNROLL
      for (int part = 1; part < kParts; ++part) {
        slice(i) = part == rank ? sums(part * kOwn + i) : slice(i);
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int sender = 0; sender < kParts - 1; ++sender) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kFours; ++i) {
        const float4 given = storage[sender][i][thread];
        slice(4 * i) += given.x;
        slice(4 * i + 1) += given.y;
        slice(4 * i + 2) += given.z;
        slice(4 * i + 3) += given.w;
      }
    }
  }
};

template <class X, int kTileM, int kTileN, int kParts>
struct GemmSm90Parts {
  static_assert(kTileM == 128, "64 rows for each of two warpgroups");
  using Operands = GemmParts<X, X, kTileM, kTileN, 64, Alone, Cooperative, Rows::kTokens>;
  using Mainloop = typename Operands::Mainloop;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using Epilogue = GemmEpilogue<X, typename Operands::OutStride, Rows::kTokens, Combine::kStore>;
  using Exchange = SumExchange<X, kTileN, kParts>;
  using Problem = cute::Shape<int, int, int, int>;
  /// As the pipeline sees it: a stage is free once all CTAs have multiplied theirs.
  using Cluster = cute::Shape<cute::Int<kParts>, cute::_1, cute::_1>;

  static constexpr int kWarpgroup = 128;
  static constexpr int kThreads = kWarpgroup + Exchange::kThreads;  // the first copies

  struct Params {
    typename Mainloop::Params mainloop;
    typename Epilogue::Params epilogue;
    Problem problem;
    int m_tiles, tiles;
    int steps;  // of K for a CTA: the last ones of the last CTA may be beyond K, and are zeros
  };

  struct SharedStorage {
    union {  // in turn
      typename Mainloop::TensorStorage tensors;
      alignas(128) typename Exchange::Storage sums;
    };
    typename Mainloop::PipelineStorage pipeline;
  };
  static_assert(sizeof(SharedStorage) <=
                cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);

  /// Counts through the steps of a part of K.
  struct Step {
    int at;
    CUTLASS_DEVICE int operator*() const { return at; }
    CUTLASS_DEVICE Step& operator++() {
      ++at;
      return *this;
    }
  };

  CUTLASS_DEVICE static Pipeline make_pipeline(const Params& params, SharedStorage& shared) {
    const bool is_producer = threadIdx.x < kWarpgroup;
    typename Pipeline::Params pipeline;
    pipeline.role =
        is_producer ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
    pipeline.is_leader = threadIdx.x == 0;
    pipeline.num_consumers = Exchange::kThreads;
    pipeline.transaction_bytes = params.mainloop.tma_transaction_bytes;
    return Pipeline(shared.pipeline, pipeline, Cluster{});
  }

  /// All threads of the cluster take part in its two barriers, those that copy as well.
  CUTLASS_DEVICE static void meet() {
    __syncwarp();
    cute::cluster_sync();
  }

  /// Of the CTA: what others gave it has been read.
  CUTLASS_DEVICE static void all_taken() { sync_threads(/*barrier=*/1, kThreads); }

  CUTLASS_DEVICE static void copy_tiles(const Params& params, SharedStorage& shared,
                                        Pipeline pipeline, int rank) {
    auto state = cutlass::make_producer_start_state<Pipeline>();
    Mainloop mainloop;
    const auto inputs = mainloop.load_init(params.problem, params.mainloop);
    for (int tile = blockIdx.x / kParts; tile < params.tiles; tile += gridDim.x / kParts) {
      if (threadIdx.x < cutlass::NumThreadsPerWarp) {
        const auto coord =
            cute::make_coord(tile % params.m_tiles, tile / params.m_tiles, cute::_, 0);
        mainloop.load(params.mainloop, pipeline, state, inputs, coord, Step{rank * params.steps},
                      params.steps, threadIdx.x, /*block_rank_in_cluster=*/0, shared.tensors);
        state.advance(params.steps);
      }
      meet();  // all is multiplied
      meet();  // all is given
      all_taken();
    }
  }

  CUTLASS_DEVICE static void multiply_tiles(const Params& params, SharedStorage& shared,
                                            Pipeline pipeline, int rank) {
    typename Mainloop::PipelineState state;
    typename Mainloop::TiledMma mma;
    typename Exchange::SliceMma slice_mma;
    Mainloop mainloop;
    const Epilogue epilogue(params.epilogue);
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
    const auto tile_shape = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>>{};
    const auto slice_shape = typename Exchange::SliceTile{};
    auto sums = cute::partition_fragment_C(mma, tile_shape);
    auto slice = cute::partition_fragment_C(slice_mma, cute::take<0, 2>(slice_shape));
    for (int tile = blockIdx.x / kParts; tile < params.tiles; tile += gridDim.x / kParts) {
      mainloop.mma(pipeline, state, sums, params.steps, thread, shared.tensors, params.mainloop);
      mainloop.mma_tail(pipeline, state, params.steps);
      state.advance(params.steps);
      meet();
      Exchange::give(sums, shared.sums, rank, thread);
      meet();
      Exchange::take(sums, shared.sums, rank, thread, slice);
      fence_for_async_reads();  // the next tile is copied to where the sums were
      all_taken();
      const auto coord =
          cute::make_coord(tile % params.m_tiles, tile / params.m_tiles * kParts + rank, 0, 0);
      epilogue(params.problem, slice_shape, coord, slice, slice_mma, 0, thread, nullptr);
    }
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
                                                .is_gelu = false};
    NF_CHECK(
        Mainloop::can_implement(problem, mainloop) && Epilogue::can_implement(problem, epilogue),
        "gemm: cannot use this kernel for T=", a.shape.rows, " N=", a.shape.features,
        " K=", a.shape.depth);
    const int m_tiles = ceil_div(a.shape.rows, kTileM);
    return {.mainloop = Mainloop::to_underlying_arguments(problem, mainloop, nullptr),
            .epilogue = epilogue,
            .problem = problem,
            .m_tiles = m_tiles,
            .tiles = m_tiles * ceil_div(a.shape.features, kTileN),
            .steps = ceil_div(ceil_div(a.shape.depth, 64), kParts)};
  }

  static void launch(const GemmArguments& a);
};

template <class Gemm>
__global__ void __launch_bounds__(Gemm::kThreads, 1)
    multiply_parts(const __grid_constant__ typename Gemm::Params params) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename Gemm::SharedStorage*>(memory);
  if (threadIdx.x == 0) Gemm::Mainloop::prefetch_tma_descriptors(params.mainloop);
  const auto pipeline = Gemm::make_pipeline(params, shared);
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  cute::cluster_sync();  // the pipelines' barriers are there
  if (threadIdx.x < Gemm::kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    Gemm::copy_tiles(params, shared, pipeline, rank);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    Gemm::multiply_tiles(params, shared, pipeline, rank);
  }
}

template <class X, int kTileM, int kTileN, int kParts>
void GemmSm90Parts<X, kTileM, kTileN, kParts>::launch(const GemmArguments& a) {
  const Params params = params_of(a);
  const int clusters = std::clamp(a.sms / kParts, 1, params.tiles);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kParts, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * kParts);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(SharedStorage);
  config.stream = a.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto kernel = multiply_parts<GemmSm90Parts>;
  NF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     sizeof(SharedStorage)));
  NF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace nanoflow::cuda
