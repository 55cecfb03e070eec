#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/mma.cuh"

// What one warp does with 16 packed rows beside products: the online softmax, and where they lie.

namespace nanoflow::cuda {

/// Of 16 packed rows, as this lane sees them: `0` is row lane / 4, `1` is eight rows on.
template <int D>
struct RowState {
  float out[D / 8][4];
  float max[2];  // what scores are told relative to, not yet scaled: at most kScoreSlack below the
                 // largest
  float sum[2];  // of this lane's columns
  int limit[2];  // key that the row ends before
};

/// Powers of two by which weights may pass 1: what is told relative to the largest score so far is
/// then seldom told anew.
inline constexpr float kScoreSlack = 8;

/// Where rows end, and how far they look back.
struct Limits {
  int least, most;  // of the rows' ends
  int window;

  /// Whether every row sees keys [begin, end), of which there is one that some row sees.
  __device__ bool all_see(int begin, int end) const {
    return end <= least && begin >= first_key(most, window);
  }
};

/// Where the packed rows of one KV head's query heads are.
struct PackedRows {
  int64_t first;   // element of the first row's first head
  int64_t stride;  // between rows
  int group, count;

  __device__ int64_t element(int packed, int head_dim) const {
    const int row = packed / group;
    return first + row * stride + static_cast<int64_t>(packed - row * group) * head_dim;
  }
};

/// Starts packed rows [base, base + 16) of `count`. The request's first row sees `visible` keys and
/// every next one a key more; rows past the count are like its first.
template <int D>
__device__ void start_rows(RowState<D>& rows, int base, int count, int group, int visible) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.out[n][i] = 0.0f;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int packed = base + threadIdx.x % 32 / 4 + 8 * half;
    rows.limit[half] = visible + (packed < count ? packed / group : 0);
    rows.max[half] = -INFINITY;
    rows.sum[half] = 0.0f;
  }
}

/// Largest value of the four lanes that share a row.
__device__ inline float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

__device__ inline float row_sum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

/// What to subtract from scores whose largest is `max`: nothing where there is none.
__device__ inline float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

/// Scores of keys from `begin` on that a row does not see become -infinity.
template <int D, int kColumns>
__device__ void mask_scores(float (&s)[kColumns][4], const RowState<D>& rows, int begin,
                            int window) {
  const int first = begin + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + 8 * n + i % 2, limit = rows.limit[i / 2];
      if (key >= limit || key < limit - window) s[n][i] = -INFINITY;
    }
  }
}

/// Turns scores into weights, in place; `keep` is what the outputs so far are to be multiplied by.
/// A row's values never depend on other rows.
template <int D, int kColumns>
__device__ void weigh(RowState<D>& rows, float (&s)[kColumns][4], float (&keep)[2],
                      float scale_log2) {
  const float slack = kScoreSlack / scale_log2;
  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    }
    top = row_max(top);
    const float max = top > rows.max[half] + slack ? top : rows.max[half];
    keep[half] = exp2_approx((rows.max[half] - shift_of(max)) * scale_log2);
    shift[half] = shift_of(max) * scale_log2;
    rows.max[half] = max;
    rows.sum[half] *= keep[half];
  }
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = exp2_approx(s[n][i] * scale_log2 - shift[i / 2]);
      rows.sum[i / 2] += s[n][i];
    }
  }
}

/// Outputs so far follow the sums.
template <int D>
__device__ void keep_outputs(RowState<D>& rows, const float (&keep)[2]) {
  if (!__any_sync(~0u, keep[0] != 1.0f || keep[1] != 1.0f)) return;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.out[n][i] *= keep[i / 2];
  }
}

/// Weights as the left side of the products with values.
template <class T, int kTiles>
__device__ void pack_weights(uint32_t (&p)[kTiles][4], const float (&s)[2 * kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = s[2 * n + i / 2];
      p[n][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
  }
}

/// Divides by the sums and writes rows [base, base + 16) that exist.
template <class T, int D>
__device__ void finish_rows(const RowState<D>& state, T* out, const PackedRows& rows, int base) {
  const int lane = threadIdx.x % 32;
  const float scale[2] = {1.0f / row_sum(state.sum[0]), 1.0f / row_sum(state.sum[1])};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int packed = base + lane / 4 + 8 * half;
    if (packed >= rows.count) continue;
    T* to = out + rows.element(packed, D) + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<uint32_t*>(to + 8 * n) =
          pack<T>(state.out[n][2 * half] * scale[half], state.out[n][2 * half + 1] * scale[half]);
    }
  }
}

}  // namespace nanoflow::cuda
