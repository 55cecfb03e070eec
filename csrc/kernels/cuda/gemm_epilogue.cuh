#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>

// What becomes of a tile's sums: from the registers, where wgmma leaves them, straight to global
// memory.
//
// wgmma leaves every 8 × 8 block of a tile in a warp like this: thread 4 g + t holds row g, columns
// 2 t and 2 t + 1. Four neighbouring blocks, exchanged within a quad, give each of its threads all
// columns of one block's row: 16 bytes. That takes no shared memory, so the mainloop has all of it.

namespace nanoflow::cuda {

// Which operand supplies the rows of the tensor cores' tile (128 at a time, cooperatively).
enum class Rows {
  kTokens,    // tile: tokens × features
  kFeatures,  // tile: features × tokens, for few tokens; the product is computed transposed
};

enum class Combine {
  kStore,    // out = sums [+ bias] [+ out]
  kSiluMul,  // out = silu(gate) * up; features are 8 of gate, then the 8 of up they belong to, ...
};

/// Two values as a register.
template <class T>
__device__ inline uint32_t pack_pair(cutlass::Array<float, 2> values) {
  const auto rounded = cutlass::NumericArrayConverter<T, float, 2>{}(values);
  return reinterpret_cast<const uint32_t&>(rounded);
}

template <class T>
__device__ inline cutlass::Array<float, 2> unpack_pair(uint32_t pair) {
  return cutlass::NumericArrayConverter<float, T, 2>{}(
      reinterpret_cast<const cutlass::Array<T, 2>&>(pair));
}

/// Thread t of a quad gives its value i to thread i, as that one's value t. Its own inverse.
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  const auto exchange = [](uint32_t& low, uint32_t& high, unsigned mask) {
    const bool is_high = threadIdx.x & mask;
    const uint32_t got = __shfl_xor_sync(~0U, is_high ? low : high, mask);
    low = is_high ? got : low;
    high = is_high ? high : got;
  };
  exchange(v[0], v[1], 1);
  exchange(v[2], v[3], 1);
  exchange(v[0], v[2], 2);
  exchange(v[1], v[3], 2);
}

/// Transposes an 8 × 8 block of 16-bit values: thread 4 g + t holds row g, columns 2 t, 2 t + 1.
__device__ inline uint32_t transpose_block(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

__device__ inline float activated(bool is_gelu, float x) {
  constexpr float kTwice = 1.5957691216F;  // 2 sqrt(2 / pi): (1 + tanh(y)) / 2 is sigmoid(2 y)
  const float y = is_gelu ? kTwice * (x + 0.044715F * x * x * x) : x;
  return __fdividef(x, 1.0F + __expf(-y));
}

/// An epilogue for CUTLASS's warp-specialised kernels, inside its Sm90TmaWarpSpecializedAdapter.
template <class Out, class Stride, Rows kRows, Combine kCombine>
class GemmEpilogue {
 public:
  using ElementC = Out;
  using ElementD = Out;
  using StrideC = Stride;
  using StrideD = Stride;
  struct ThreadEpilogueOp {  // what CUTLASS wants to know
    using ElementOutput = Out;
    using ElementAccumulator = float;
    using ElementCompute = float;
    using ElementScalar = float;
    using ElementD = Out;
    static constexpr int kCount = 1;
  };
  struct SharedStorage {};
  using TensorStorage = SharedStorage;

  struct Arguments {
    Out* out;            // [T, N], with kSiluMul [T, N / 2]
    int64_t out_stride;  // from token to token, in elements
    const Out* bias;     // [N], or null
    bool accumulate;     // adds to what out holds
    bool is_gelu;        // kSiluMul with the other activation
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
    const int features = kIsTransposed ? cute::get<0>(problem) : cute::get<1>(problem);
    return kIsFloat || features % (kBlock * kShrink) == 0;  // whole pieces of 16 bytes
  }

  CUTLASS_HOST_DEVICE explicit GemmEpilogue(const Params& params) : params_(params) {}

  template <class Problem, class Tile, class Coord, class Sums, class TiledMma, class Residue>
  CUTLASS_DEVICE void operator()(Problem problem, Tile tile, Coord coord, const Sums& sums,
                                 TiledMma mma, Residue, int thread, char*) const {
    using namespace cute;
    // sums: [((2 columns, 2 rows 8 apart, blocks along N), slabs along M, slabs along N)]
    static_assert(size<0, 0>(Sums{}) == 2 && size<0, 1>(Sums{}) == 2);
    const Tensor places = mma.get_slice(thread).partition_C(
        make_identity_tensor(make_shape(size<0>(tile), size<1>(tile))));
    const int origin_m = static_cast<int>(get<0>(coord)) * size<0>(tile);
    const int origin_n = static_cast<int>(get<1>(coord)) * size<1>(tile);
    const auto finish_all = [&](auto adds) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size<1>(sums); ++i) {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < size<2>(sums); ++j) {
          const auto place = places(0, i, j);
          const Slab slab(origin_m + get<0>(place), origin_n + get<1>(place), thread, problem);
          finish<decltype(adds)::value>(sums(_, i, j), slab);
        }
      }
    };
    if (kMayAdd && (params_.accumulate || params_.bias != nullptr)) {
      finish_all(bool_constant<kMayAdd>{});
    } else {
      finish_all(false_type{});
    }
  }

 private:
  static constexpr bool kIsTransposed = kRows == Rows::kFeatures;
  static constexpr bool kIsSiluMul = kCombine == Combine::kSiluMul;
  static constexpr bool kIsFloat = cute::is_same_v<Out, float>;
  static constexpr bool kMayAdd = !kIsSiluMul && !kIsFloat;
  static constexpr int kBlock = 8;                    // rows or columns
  static constexpr int kQuad = 4;                     // threads that share a block's row
  static constexpr int kShrink = kIsSiluMul ? 2 : 1;  // features of the product for one of out

  /// A thread's part of 64 rows of the tile. A line is 8 rows of the tile that become out's, a
  /// chunk 8 columns; the piece of a line and a chunk is eight features of one token.
  struct Slab {
    int g, t;            // the thread's row in a block, its pair of columns
    int token, feature;  // of the piece of line 0 and chunk 0, once the thread holds whole pieces
    int tokens, features;

    template <class Problem>
    CUTLASS_DEVICE Slab(int m, int n, int thread, const Problem& problem)
        : g(thread / kQuad % kBlock), t(thread % kQuad) {
      const int first_n = n - 2 * t;
      const int size_m = cute::get<0>(problem), size_n = cute::get<1>(problem);
      token = kIsTransposed ? first_n + g : m;
      feature = (kIsTransposed ? m - g : first_n) / kShrink;
      tokens = kIsTransposed ? size_n : size_m;
      features = (kIsTransposed ? size_m : size_n) / kShrink;
    }
    CUTLASS_DEVICE int token_of(int line, int chunk) const {
      return token + kBlock * (kIsTransposed ? chunk : line);
    }
    CUTLASS_DEVICE int feature_of(int line, int chunk) const {
      return feature + kBlock * (kIsTransposed ? line : chunk);
    }
    CUTLASS_DEVICE bool holds(int line, int chunk) const {
      return token_of(line, chunk) < tokens && feature_of(line, chunk) < features;
    }
  };

  CUTLASS_DEVICE Out* piece(const Slab& slab, int line, int chunk) const {
    return params_.out + slab.token_of(line, chunk) * params_.out_stride +
           slab.feature_of(line, chunk);
  }

  /// What the thread's two sums of a line and a chunk become.
  template <class Sums>
  CUTLASS_DEVICE cutlass::Array<float, 2> pair_of(const Sums& sums, int line, int chunk) const {
    const auto sum = [&](int column, int row, int block) {
      return sums(cute::make_coord(cute::make_coord(column, row, block)));
    };
    cutlass::Array<float, 2> pair;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      if constexpr (!kIsSiluMul) {
        pair[i] = sum(i, line, chunk);
      } else if constexpr (kIsTransposed) {
        pair[i] = activated(params_.is_gelu, sum(i, 0, chunk)) * sum(i, 1, chunk);
      } else {
        pair[i] = activated(params_.is_gelu, sum(i, line, 2 * chunk)) * sum(i, line, 2 * chunk + 1);
      }
    }
    return pair;
  }

  CUTLASS_DEVICE void add_bias(cutlass::Array<float, 2>& pair, const Slab& slab, int line,
                               int chunk) const {
    const int feature = slab.feature_of(line, chunk);
    if (params_.bias == nullptr || feature >= slab.features) return;
    if constexpr (kIsTransposed) {  // a feature, two tokens
      const auto bias = static_cast<float>(params_.bias[feature + slab.g]);
      pair[0] += bias;
      pair[1] += bias;
    } else {
      const auto* bias = reinterpret_cast<const uint32_t*>(params_.bias + feature);
      add(pair, bias[slab.t]);
    }
  }

  CUTLASS_DEVICE static void add(cutlass::Array<float, 2>& pair, uint32_t addend) {
    const auto values = unpack_pair<Out>(addend);
    pair[0] += values[0];
    pair[1] += values[1];
  }

  /// Between how wgmma leaves a pair and how a token's piece needs it, either way.
  CUTLASS_DEVICE static uint32_t turn(uint32_t pair) {
    return kIsTransposed ? transpose_block(pair) : pair;
  }

  template <bool kAdds, class Sums>
  CUTLASS_DEVICE void finish(const Sums& sums, const Slab& slab) const {
    constexpr int kBlocks = decltype(cute::size<0, 2>(sums))::value;
    constexpr int kLines = kIsTransposed ? 2 / kShrink : 2;
    constexpr int kChunks = kIsTransposed ? kBlocks : kBlocks / kShrink;
    if constexpr (kIsFloat) {
      store_floats<kLines, kChunks>(sums, slab);
    } else {
      constexpr int kFours = kChunks / kQuad;
      if constexpr (kFours > 0) store_pieces<kAdds, kLines, kFours>(sums, slab);
      store_pairs<kAdds, kLines, kFours * kQuad, kChunks>(sums, slab);
    }
  }

  /// 16 bytes a thread: chunk t of every four.
  template <bool kAdds, int kLines, int kFours, class Sums>
  CUTLASS_DEVICE void store_pieces(const Sums& sums, const Slab& slab) const {
    uint4 old[kAdds ? kLines * kFours : 1];
    if constexpr (kAdds) {  // all at once: their latency is paid once
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kLines * kFours; ++i) {
        const int line = i / kFours, chunk = i % kFours * kQuad + slab.t;
        old[i] = make_uint4(0, 0, 0, 0);
        if (params_.accumulate && slab.holds(line, chunk)) {
          old[i] = *reinterpret_cast<const uint4*>(piece(slab, line, chunk));
        }
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kLines * kFours; ++i) {
      const int line = i / kFours, first = i % kFours * kQuad;
      uint32_t addend[kQuad], out[kQuad];
      if constexpr (kAdds) {
        addend[0] = old[i].x, addend[1] = old[i].y, addend[2] = old[i].z, addend[3] = old[i].w;
        transpose_quad(addend);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        auto pair = pair_of(sums, line, first + c);
        if constexpr (kAdds) {
          add_bias(pair, slab, line, first + c);
          add(pair, turn(addend[c]));
        }
        out[c] = turn(pack_pair<Out>(pair));
      }
      transpose_quad(out);
      if (slab.holds(line, first + slab.t)) {
        *reinterpret_cast<uint4*>(piece(slab, line, first + slab.t)) =
            make_uint4(out[0], out[1], out[2], out[3]);
      }
    }
  }

  /// 4 bytes a thread: chunks that do not make four.
  template <bool kAdds, int kLines, int kBegin, int kEnd, class Sums>
  CUTLASS_DEVICE void store_pairs(const Sums& sums, const Slab& slab) const {
    CUTLASS_PRAGMA_UNROLL
    for (int line = 0; line < kLines; ++line) {
      CUTLASS_PRAGMA_UNROLL
      for (int chunk = kBegin; chunk < kEnd; ++chunk) {
        const bool is_held = slab.holds(line, chunk);
        auto* const out = reinterpret_cast<uint32_t*>(piece(slab, line, chunk)) + slab.t;
        auto pair = pair_of(sums, line, chunk);
        if constexpr (kAdds) {
          add_bias(pair, slab, line, chunk);
          add(pair, turn(params_.accumulate && is_held ? *out : 0));
        }
        const uint32_t packed = turn(pack_pair<Out>(pair));
        if (is_held) *out = packed;
      }
    }
  }

  /// The first `left` of two, at once where their address allows it.
  CUTLASS_DEVICE static void store_floats(float* out, const cutlass::Array<float, 2>& pair,
                                          int left) {
    if (left > 1 && reinterpret_cast<uintptr_t>(out) % sizeof(float2) == 0) {
      *reinterpret_cast<float2*>(out) = make_float2(pair[0], pair[1]);
    } else {
      if (left > 0) out[0] = pair[0];
      if (left > 1) out[1] = pair[1];
    }
  }

  template <int kLines, int kChunks, class Sums>
  CUTLASS_DEVICE void store_floats(const Sums& sums, const Slab& slab) const {
    CUTLASS_PRAGMA_UNROLL
    for (int line = 0; line < kLines; ++line) {
      CUTLASS_PRAGMA_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const auto pair = pair_of(sums, line, chunk);
        if constexpr (kIsTransposed) {  // a feature, two tokens
          const int token = slab.token_of(line, chunk) - slab.g + 2 * slab.t;
          if (slab.feature_of(line, chunk) + slab.g >= slab.features) continue;
          float* const out =
              params_.out + token * params_.out_stride + slab.feature_of(line, chunk) + slab.g;
          if (token < slab.tokens) *out = pair[0];
          if (token + 1 < slab.tokens) out[params_.out_stride] = pair[1];
        } else if (slab.token_of(line, chunk) < slab.tokens) {
          const int left = slab.features - slab.feature_of(line, chunk) - 2 * slab.t;
          store_floats(piece(slab, line, chunk) + 2 * slab.t, pair, left);
        }
      }
    }
  }

  Params params_;
};

}  // namespace nanoflow::cuda
