#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/mma.cuh"

// What one warp does with 16 packed rows: products with keys in shared memory and the online
// softmax.

namespace nanoflow::cuda {

/// The 16-byte chunk `chunk` of a row of D elements lies at a place that makes eight rows of one
/// chunk fall into different banks.
template <int D>
__device__ inline uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * D * 2 + ((chunk ^ (row & 7)) << 4));
}

/// Of 16 packed rows, as this lane sees them: `0` is row lane / 4, `1` is eight rows on.
template <class T, int D>
struct RowState {
  uint32_t q[D / 16][4];
  float out[D / 8][4];
  float max0, max1;    // of the scores so far, not yet scaled
  float sum0, sum1;    // of this lane's columns
  int limit0, limit1;  // key that the row ends before
};

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

/// Starts packed rows [base, base + 16). The request's first row sees `visible` keys and every next
/// one a key more; packed rows past the count are zeros.
template <class T, int D>
__device__ void start_rows(RowState<T, D>& state, const T* q, const PackedRows& rows, int base,
                           int visible) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int packed = base + lane / 4 + 8 * half;
    const bool valid = packed < rows.count;
    const T* from = q + rows.element(valid ? packed : 0, D) + 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      state.q[k][half] = valid ? *reinterpret_cast<const uint32_t*>(from + 16 * k) : 0u;
      state.q[k][half + 2] = valid ? *reinterpret_cast<const uint32_t*>(from + 16 * k + 8) : 0u;
    }
    (half == 0 ? state.limit0 : state.limit1) = visible + (valid ? packed / rows.group : 0);
  }
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.out[n][i] = 0.0f;
  }
  state.max0 = state.max1 = -INFINITY;
  state.sum0 = state.sum1 = 0.0f;
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

/// The scores' exponentials, in place; the sums and outputs so far follow the new maxima.
template <class T, int D, int kColumns>
__device__ void soften(RowState<T, D>& state, float (&s)[kColumns][4], float scale_log2) {
  float max0 = state.max0, max1 = state.max1;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    max0 = fmaxf(max0, fmaxf(s[n][0], s[n][1]));
    max1 = fmaxf(max1, fmaxf(s[n][2], s[n][3]));
  }
  max0 = row_max(max0);
  max1 = row_max(max1);
  if (__any_sync(~0u, max0 > state.max0 || max1 > state.max1)) {
    const float keep0 = exp2_approx((state.max0 - shift_of(max0)) * scale_log2);
    const float keep1 = exp2_approx((state.max1 - shift_of(max1)) * scale_log2);
    state.sum0 *= keep0;
    state.sum1 *= keep1;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      state.out[n][0] *= keep0;
      state.out[n][1] *= keep0;
      state.out[n][2] *= keep1;
      state.out[n][3] *= keep1;
    }
    state.max0 = max0;
    state.max1 = max1;
  }
  const float shift0 = shift_of(max0) * scale_log2, shift1 = shift_of(max1) * scale_log2;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    s[n][0] = exp2_approx(s[n][0] * scale_log2 - shift0);
    s[n][1] = exp2_approx(s[n][1] * scale_log2 - shift0);
    state.sum0 += s[n][0] + s[n][1];
    s[n][2] = exp2_approx(s[n][2] * scale_log2 - shift1);
    s[n][3] = exp2_approx(s[n][3] * scale_log2 - shift1);
    state.sum1 += s[n][2] + s[n][3];
  }
}

/// Whether 16 keys' values, rows of D elements one after the other, hold an infinity or NaN.
template <class T, int D>
__device__ bool holds_non_finite(uint32_t v_shared) {
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const uint4 words = load_shared(v_shared + (i * 32 + threadIdx.x % 32) * 16);
    found |= non_finite<T>(words.x) | non_finite<T>(words.y) | non_finite<T>(words.z) |
             non_finite<T>(words.w);
  }
  return __any_sync(~0u, found != 0);
}

/// out += p · v for 16 keys of which some rows see none of the values that are not finite: zero
/// times infinity would spoil these rows too. `seen` is 1 where a row sees a key, else 0.
template <class T, int D>
__device__ void add_non_finite(float (&out)[D / 8][4], const uint32_t (&p)[4],
                               const uint32_t (&seen)[4], uint32_t v_shared) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
    uint32_t b[4], ones[4];
    load_matrices_transposed(
        b, v_shared + chunk_offset<D>(lane / 8 % 2 * 8 + lane % 8, 2 * d + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bad = non_finite<T>(b[i]);
      b[i] &= ~bad;
      ones[i] = bad & pack<T>(1.0f, 1.0f);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float hits[4] = {};
      mma_16x8x16<T>(hits, seen, ones[2 * half], ones[2 * half + 1]);
      mma_16x8x16<T>(out[2 * d + half], p, b[2 * half], b[2 * half + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (hits[i] > 0.0f) out[2 * d + half][i] = NAN;
      }
    }
  }
}

/// Attends to kKeys keys from key `begin` of the request on, whose K and V lie in shared memory.
template <class T, int D, int kKeys>
__device__ void attend(RowState<T, D>& state, uint32_t k_shared, uint32_t v_shared, int begin,
                       const Limits& limits, float scale_log2) {
  const int lane = threadIdx.x % 32;
  // Few keys are few independent products: their sums then run in two chains.
  constexpr int kChains = kKeys == 16 ? 2 : 1;
  float chains[kChains][kKeys / 8][4] = {};
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t b[4];
      load_matrices(
          b, k_shared + chunk_offset<D>(16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      mma_16x8x16<T>(chains[k % kChains][2 * n], state.q[k], b[0], b[1]);
      mma_16x8x16<T>(chains[k % kChains][2 * n + 1], state.q[k], b[2], b[3]);
    }
  }
  float (&s)[kKeys / 8][4] = chains[0];
  if constexpr (kChains == 2) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] += chains[1][n][i];
    }
  }
  if (!limits.all_see(begin, begin + kKeys)) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = begin + 8 * n + 2 * (lane % 4) + i % 2;
        const int limit = i < 2 ? state.limit0 : state.limit1;
        if (key >= limit || key < limit - limits.window) s[n][i] = -INFINITY;
      }
    }
  }
  soften<T, D, kKeys / 8>(state, s, scale_log2);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    const uint32_t p[4] = {pack<T>(s[2 * n][0], s[2 * n][1]), pack<T>(s[2 * n][2], s[2 * n][3]),
                           pack<T>(s[2 * n + 1][0], s[2 * n + 1][1]),
                           pack<T>(s[2 * n + 1][2], s[2 * n + 1][3])};
    const int key = begin + 16 * n;
    if (!limits.all_see(key, key + 16) && holds_non_finite<T, D>(v_shared + 16 * n * D * 2)) {
      uint32_t seen[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int left =  // keys to the row's end, from the first of a pair on
            (i % 2 == 0 ? state.limit0 : state.limit1) - key - 2 * (lane % 4) - i / 2 * 8;
        seen[i] = pack<T>(left > 0 && left <= limits.window ? 1.0f : 0.0f,
                          left > 1 && left <= limits.window + 1 ? 1.0f : 0.0f);
      }
      add_non_finite<T, D>(state.out, p, seen, v_shared + 16 * n * D * 2);
      continue;
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      load_matrices_transposed(
          b, v_shared + chunk_offset<D>(16 * n + lane / 8 % 2 * 8 + lane % 8, 2 * d + lane / 16));
      mma_16x8x16<T>(state.out[2 * d], p, b[0], b[1]);
      mma_16x8x16<T>(state.out[2 * d + 1], p, b[2], b[3]);
    }
  }
}

/// Divides by the sums and writes rows [base, base + 16) that exist.
template <class T, int D>
__device__ void finish_rows(const RowState<T, D>& state, T* out, const PackedRows& rows, int base) {
  const int lane = threadIdx.x % 32;
  const float scale[2] = {1.0f / row_sum(state.sum0), 1.0f / row_sum(state.sum1)};
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
