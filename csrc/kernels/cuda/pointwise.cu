#include "kernels/cuda/check.h"
#include "kernels/cuda/grid.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/shapes.h"

// Embedding, rotation with KV append, SiLU and gathers. The work is a list of 16-byte pieces that
// all threads share; a grid covers the lane's SMs and loops.

namespace nanoflow::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;
constexpr int64_t kMaxPieces = int64_t{1} << 31;
constexpr int kRopeHeads = 4;               // that a thread rotates by the same angles
constexpr int kRopeBlocksPerSm = 3;         // at once: as many as have registers enough
constexpr uint4 kNans{~0u, ~0u, ~0u, ~0u};  // a NaN in float32, float16 and bfloat16

/// Calls fn(row, piece) once for all pieces of all rows, less than kMaxPieces: 64-bit divisions
/// would take longer than what is done with their results.
template <typename Fn>
__device__ void for_pieces(int64_t rows, int pieces, const Fn& fn) {
  const unsigned count = static_cast<unsigned>(rows) * pieces;
  for (unsigned i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    fn(static_cast<int>(i / pieces), static_cast<int>(i % pieces));
  }
}

/// A matrix whose rows are moved without regard to their dtype; strides in 16-byte pieces.
struct Rows {
  uint4* data;
  int64_t stride;
  int64_t count;

  explicit Rows(const Tensor& tensor)
      : data(tensor.data<uint4>()),
        stride(tensor.stride(0) * static_cast<int64_t>(size_of(tensor.dtype())) /
               static_cast<int64_t>(sizeof(uint4))),
        count(tensor.size(0)) {}
};

int pieces_of(const Tensor& tensor) {
  return static_cast<int>(tensor.size(tensor.dims() - 1) *
                          static_cast<int64_t>(size_of(tensor.dtype())) /
                          static_cast<int64_t>(sizeof(uint4)));
}

int grid_of(int64_t rows, int pieces, const CudaLane& lane) {
  NF_CHECK(rows * pieces < kMaxPieces, "a GPU moves less than ", kMaxPieces, " pieces of ",
           sizeof(uint4), " bytes at once, not ", rows, " rows of ", pieces);
  return grid_size((rows * pieces + kThreads - 1) / kThreads, kBlocksPerSm, lane);
}

/// Eight values of T times a factor that is rounded to T; 1 leaves them as they are.
template <typename T>
struct Scale {
  float factor;

  __device__ uint4 operator()(const uint4& raw) const {
    if (factor == 1) return raw;
    Pack<T> pack;
    pack.raw = raw;
    const float rounded = to_float(from_float<T>(factor));
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      pack.values[i] = from_float<T>(to_float(pack.values[i]) * rounded);
    }
    return pack.raw;
  }
};

/// A token that is not in the table gives a row of NaN, which Sample reports.
template <typename T>
__global__ void embed_kernel(const int32_t* tokens, const int32_t* token_pool, int64_t slots,
                             Rows table, Rows out, int pieces, Scale<T> scale) {
  for_pieces(out.count, pieces, [&](int row, int piece) {
    int64_t token = tokens[row];
    if (token < 0) token = -1 - token < slots ? token_pool[-1 - token] : -1;
    const bool is_known = token >= 0 && token < table.count;
    out.data[row * out.stride + piece] =
        is_known ? scale(table.data[token * table.stride + piece]) : kNans;
  });
}

__global__ void gather_kernel(const int32_t* index, Rows x, Rows out, int pieces) {
  for_pieces(out.count, pieces, [&](int row, int piece) {
    const int64_t from = index[row];
    uint4 value{};
    if (from >= 0) value = from < x.count ? x.data[from * x.stride + piece] : kNans;
    out.data[row * out.stride + piece] = value;
  });
}

template <typename T>
struct Cache {
  T* data;
  int64_t page_stride, head_stride, token_stride;

  explicit Cache(const Tensor& tensor)
      : data(tensor.data<T>()),
        page_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)),
        token_stride(tensor.stride(2)) {}

  __device__ T* at(int64_t page, int head, int64_t token) const {
    return data + page * page_stride + head * head_stride + token * token_stride;
  }
};

/// Heads that one thread rotates are so far apart.
__host__ __device__ int heads_apart(int heads) { return (heads + kRopeHeads - 1) / kRopeHeads; }

template <typename T>
struct RopeArgs {
  T* qkv;
  int64_t qkv_stride, rows;
  const int32_t *positions, *kv_slots;
  const float* cos_sin;  // [max_positions, D]
  int64_t max_positions, cos_sin_stride;
  Cache<T> k_cache, v_cache;
  int64_t cache_slots;
  int page_size;
  int q_heads, kv_heads, half;
  const T *q_norm, *k_norm;  // [D] each, or null
  float norm_eps;
  bool norm_unit_offset;
};

/// NaNs where there is nothing to load.
__device__ void load_floats(const float* from, float (&to)[kPack]) {
#pragma unroll
  for (int i = 0; i < kPack; i += 4) {
    const uint4 raw = from == nullptr ? kNans : *reinterpret_cast<const uint4*>(from + i);
    to[i] = __uint_as_float(raw.x);
    to[i + 1] = __uint_as_float(raw.y);
    to[i + 2] = __uint_as_float(raw.z);
    to[i + 3] = __uint_as_float(raw.w);
  }
}

/// The angles of a position at `offset` of a head. One that the table lacks gives NaN.
template <typename T>
struct Angles {
  float cosines[kPack], sines[kPack];

  __device__ Angles(const RopeArgs<T>& a, int64_t position, int offset) {
    const bool is_known = position >= 0 && position < a.max_positions;
    const float* table = a.cos_sin + position * a.cos_sin_stride + offset;
    load_floats(is_known ? table : nullptr, cosines);
    load_floats(is_known ? table + a.half : nullptr, sines);
  }

  /// Rotates a pair of packs, one of each half of a head.
  __device__ void rotate(Pack<T>& first, Pack<T>& second) const {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float x = to_float(first.values[i]), y = to_float(second.values[i]);
      first.values[i] = from_float<T>(x * cosines[i] - y * sines[i]);
      second.values[i] = from_float<T>(y * cosines[i] + x * sines[i]);
    }
  }
};

/// RmsNorm of a head that `lanes` threads side by side hold, a power of two: each two packs, that
/// at `offset` of either half. The group has its own mask, for others of the warp may be elsewhere.
template <typename T>
__device__ void norm_head(Pack<T>& first, Pack<T>& second, const T* weight, const RopeArgs<T>& a,
                          int lanes, int offset) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const float x = to_float(first.values[i]), y = to_float(second.values[i]);
    squares += x * x + y * y;
  }
  const unsigned group = (~0u >> (kWarp - lanes)) << (threadIdx.x % kWarp / lanes * lanes);
  for (int step = lanes / 2; step > 0; step /= 2) {
    squares += __shfl_xor_sync(group, squares, step);
  }
  const float inverse = 1.0f / sqrtf(squares / static_cast<float>(2 * a.half) + a.norm_eps);
  const Pack<T> weights[] = {Pack<T>(weight + offset), Pack<T>(weight + a.half + offset)};
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const float x = to_float(first.values[i]), y = to_float(second.values[i]);
    first.values[i] = weigh_normal(x * inverse, weights[0].values[i], a.norm_unit_offset);
    second.values[i] = weigh_normal(y * inverse, weights[1].values[i], a.norm_unit_offset);
  }
}

/// A piece here is two packs, the i-th of each half, of up to kRopeHeads heads.
template <typename T>
__global__ void __launch_bounds__(kThreads, kRopeBlocksPerSm)
    rope_append_kernel(const RopeArgs<T> a) {
  const int packs = a.half / kPack;
  const int heads = a.q_heads + 2 * a.kv_heads, step = heads_apart(heads);
  for_pieces(a.rows, step * packs, [&](int row, int piece) {
    const int64_t slot = a.kv_slots[row];
    if (slot < 0) return;  // a padding row
    const int offset = piece % packs * kPack;
    T* const at = a.qkv + row * a.qkv_stride + offset;
    Pack<T> first[kRopeHeads], second[kRopeHeads];
#pragma unroll
    for (int i = 0; i < kRopeHeads; ++i) {
      const int head = piece / packs + i * step;
      if (head >= heads) break;
      first[i] = Pack<T>(at + head * 2 * a.half);
      second[i] = Pack<T>(at + (head * 2 + 1) * a.half);
    }
    const Angles<T> angles(a, a.positions[row], offset);
    const int64_t page = static_cast<unsigned>(slot) / static_cast<unsigned>(a.page_size);
    const int64_t token = static_cast<unsigned>(slot) % static_cast<unsigned>(a.page_size);
#pragma unroll
    for (int i = 0; i < kRopeHeads; ++i) {
      const int head = piece / packs + i * step;
      if (head >= heads) break;
      const bool is_value = head >= a.q_heads + a.kv_heads;
      if (!is_value) {
        const T* norm = head < a.q_heads ? a.q_norm : a.k_norm;
        if (norm != nullptr) norm_head(first[i], second[i], norm, a, packs, offset);
        angles.rotate(first[i], second[i]);
        first[i].store(at + head * 2 * a.half);
        second[i].store(at + (head * 2 + 1) * a.half);
      }
      if (head < a.q_heads || slot >= a.cache_slots) continue;
      const int kv_head = head - a.q_heads - (is_value ? a.kv_heads : 0);
      T* const to = (is_value ? a.v_cache : a.k_cache).at(page, kv_head, token);
      first[i].store(to + offset);
      second[i].store(to + a.half + offset);
    }
  });
}

}  // namespace

void CudaKernels::run(const Embed& op, Lane& lane) {
  check_shapes(op);
  check_packs(Embed::kName, "table", op.table);
  check_packs(Embed::kName, "out", op.out);
  if (op.out.size(0) == 0) return;
  const CudaLane& own = cuda_lane(lane);
  const int pieces = pieces_of(op.out);
  const auto launch = [&](auto scale) {
    embed_kernel<<<grid_of(op.out.size(0), pieces, own), kThreads, 0, own.stream()>>>(
        op.tokens.data<int32_t>(), op.token_pool.data<int32_t>(), op.token_pool.size(0),
        Rows(op.table), Rows(op.out), pieces, scale);
  };
  if (op.scale == 1) {
    launch(Scale<__half>{1});  // of any dtype
  } else {
    dispatch_half(op.table.dtype(), Embed::kName,
                  [&](auto tag) { launch(Scale<typename decltype(tag)::type>{op.scale}); });
  }
  NF_CUDA_CHECK(cudaGetLastError());
}

void CudaKernels::run(const GatherRows& op, Lane& lane) {
  check_shapes(op);
  check_packs(GatherRows::kName, "x", op.x);
  check_packs(GatherRows::kName, "out", op.out);
  if (op.out.size(0) == 0) return;
  const CudaLane& own = cuda_lane(lane);
  const int pieces = pieces_of(op.out);
  gather_kernel<<<grid_of(op.out.size(0), pieces, own), kThreads, 0, own.stream()>>>(
      op.index.data<int32_t>(), Rows(op.x), Rows(op.out), pieces);
  NF_CUDA_CHECK(cudaGetLastError());
}

void CudaKernels::run(const RopeAppend& op, Lane& lane) {
  check_shapes(op);
  check_packs(RopeAppend::kName, "qkv", op.qkv);
  check_packs(RopeAppend::kName, "cos_sin", op.cos_sin);
  check_packs(RopeAppend::kName, "k_cache", op.k_cache);
  check_packs(RopeAppend::kName, "v_cache", op.v_cache);
  const auto D = static_cast<int>(op.k_cache.size(3));
  NF_CHECK(D % (2 * kPack) == 0, "rope_append on a GPU needs a head dim in multiples of ",
           2 * kPack, ", not ", D);
  if (op.q_norm) {
    check_packs(RopeAppend::kName, "q_norm", op.q_norm);
    check_packs(RopeAppend::kName, "k_norm", op.k_norm);
    const int lanes = D / 2 / kPack;
    NF_CHECK(lanes <= kWarp && (lanes & (lanes - 1)) == 0,
             "rope_append with norms on a GPU needs a power of two as head dim, at most ",
             kWarp * 2 * kPack, ", not ", D);
  }
  const int64_t rows = op.qkv.size(0);
  if (rows == 0) return;
  const CudaLane& own = cuda_lane(lane);
  const auto kv_heads = static_cast<int>(op.k_cache.size(1));
  const auto heads = static_cast<int>(op.qkv.size(1)) / D;
  dispatch_half(op.qkv.dtype(), RopeAppend::kName, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const RopeArgs<T> args{.qkv = op.qkv.data<T>(),
                           .qkv_stride = op.qkv.stride(0),
                           .rows = rows,
                           .positions = op.positions.data<int32_t>(),
                           .kv_slots = op.kv_slots.data<int32_t>(),
                           .cos_sin = op.cos_sin.data<float>(),
                           .max_positions = op.cos_sin.size(0),
                           .cos_sin_stride = op.cos_sin.stride(0),
                           .k_cache = Cache<T>(op.k_cache),
                           .v_cache = Cache<T>(op.v_cache),
                           .cache_slots = op.k_cache.size(0) * op.k_cache.size(2),
                           .page_size = static_cast<int>(op.k_cache.size(2)),
                           .q_heads = heads - 2 * kv_heads,
                           .kv_heads = kv_heads,
                           .half = D / 2,
                           .q_norm = op.q_norm ? op.q_norm.data<T>() : nullptr,
                           .k_norm = op.q_norm ? op.k_norm.data<T>() : nullptr,
                           .norm_eps = op.norm_eps,
                           .norm_unit_offset = op.norm_unit_offset};
    const int grid = grid_of(rows, heads_apart(heads) * D / 2 / kPack, own);
    rope_append_kernel<<<grid, kThreads, 0, own.stream()>>>(args);
  });
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
