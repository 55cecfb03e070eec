#pragma once

#include "kernels/cuda/attention_slot.cuh"

// A streamed step by tensor cores: products take keys (S = K qT) and dimensions (outT = VT PT) as
// their rows and query heads as their 8 columns.

namespace nanoflow::cuda {

template <class T, int D>
struct MmaSteps {
  using Element = T;
  static constexpr int kHeadDim = D;
  static constexpr int kKeys = kStreamKeys;  // of a slot
  static constexpr int kTiles = D / 16;      // of q's columns, and of out's rows
  static constexpr int kBlock = 16;          // keys of a product
  static constexpr int kBlocks = kKeys / kBlock;

  /// A decode in progress, as lane 4 g + t sees it.
  struct State {
    uint32_t q[D / 16][2];  // of head g: dimensions 2 t and 2 t + 1 of each 8
    float out[D / 16][4];   // of heads 2 t and 2 t + 1: dimensions g and g + 8 of each 16
    float max[2];           // of heads 2 t and 2 t + 1: what scores are told relative to, at most
                            // kScoreSlack below the largest
    float shift[2];         // max in powers of two
    float sum[2];           // of this lane's keys
  };

  const AttentionArguments& a;
  SlotLayout<D> at;
  int lane, g, t;

  __device__ MmaSteps(const AttentionArguments& arguments, const SlotLayout<D>& layout)
      : a(arguments), at(layout), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {}

  __device__ void start(State& state, const AttentionLine::Cursor& c) const {
    const T* q = static_cast<const T*>(a.q) + heads_of(a, c, a.q_stride, D) + g * D + 2 * t;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        state.q[i][half] =
            g < a.group ? *reinterpret_cast<const uint32_t*>(q + 16 * i + 8 * half) : 0u;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) state.out[i][j] = 0;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      state.max[i] = -INFINITY;
      state.shift[i] = state.sum[i] = 0;
    }
  }

  /// s[b][0], s[b][1]: key g of a block with heads 2 t and 2 t + 1; s[b][2], s[b][3]: key g + 8.
  __device__ void score(float (&s)[kBlocks][4], const State& state, uint32_t keys) const {
    float other[kBlocks][4] = {};  // two chains of sums
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[b][i] = 0;
    }
    const int key = lane / 8 % 2 * 8 + lane % 8, piece = lane / 16;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t k[4];
        load_matrices(k, keys + at.row_offset(b * kBlock + key, i / 4) +
                             SlotLayout<D>::piece_offset(key, 2 * i + piece));
        mma_16x8x16<T>(i % 2 == 0 ? s[b] : other[b], k, state.q[i][0], state.q[i][1]);
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[b][i] += other[b][i];
    }
  }

  /// Sums and outputs so far are told relative to the larger scores from now on.
  __device__ void raise_max(State& state, const float (&top)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float max = fmaxf(state.max[i], top[i]);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        max = fmaxf(max, __shfl_xor_sync(~0u, max, lanes));
      }
      const float keep = exp2_approx((state.max[i] - shift_of(max)) * a.scale_log2);
      state.max[i] = max;
      state.shift[i] = shift_of(max) * a.scale_log2;
      state.sum[i] *= keep;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        state.out[tile][i] *= keep;
        state.out[tile][2 + i] *= keep;
      }
    }
  }

  /// The scores' weights as the products with V need them; keys [skipped, left) count.
  __device__ void soften(uint32_t (&weights)[kBlocks][2], State& state, float (&s)[kBlocks][4],
                         int skipped, int left) const {
    const bool is_cut = skipped > 0 || left < kKeys;
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = b * kBlock + g + i / 2 * 8;
        if (is_cut && (key < skipped || key >= left)) s[b][i] = -INFINITY;
        top[i % 2] = fmaxf(top[i % 2], s[b][i]);
      }
    }
    const float slack = kScoreSlack / a.scale_log2;
    if (__any_sync(~0u, top[0] > state.max[0] + slack || top[1] > state.max[1] + slack)) {
      raise_max(state, top);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[b][i] = exp2_approx(s[b][i] * a.scale_log2 - state.shift[i % 2]);
        state.sum[i % 2] += s[b][i];
      }
      weights[b][0] = transpose_matrix(pack<T>(s[b][0], s[b][1]));
      weights[b][1] = transpose_matrix(pack<T>(s[b][2], s[b][3]));
    }
  }

  __device__ void add_values(State& state, const uint32_t (&weights)[kBlocks][2],
                             uint32_t values) const {
    const int key = lane / 16 * 8 + lane % 8, piece = lane / 8 % 2;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t v[4];
        load_matrices_transposed(v, values + at.row_offset(b * kBlock + key, i / 4) +
                                        SlotLayout<D>::piece_offset(key, 2 * i + piece));
        mma_16x8x16<T>(state.out[i], v, weights[b][0], weights[b][1]);
      }
    }
  }

  /// Attends to a slot's keys [skipped, left).
  __device__ void attend(State& state, uint32_t keys, uint32_t values, int skipped,
                         int left) const {
    float s[kBlocks][4];
    uint32_t weights[kBlocks][2];
    score(s, state, keys);
    soften(weights, state, s, skipped, left);
    add_values(state, weights, values);
  }

  __device__ static float sum_of(float value) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
  }

  __device__ void finish(const State& state, const AttentionLine::Cursor& c) const {
    T* out = static_cast<T*>(a.out) + heads_of(a, c, a.out_stride, D) + g * D + 2 * t;
    const float scale[2] = {1.0f / sum_of(state.sum[0]), 1.0f / sum_of(state.sum[1])};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = transpose_matrix(
            pack<T>(state.out[i][2 * half] * scale[0], state.out[i][2 * half + 1] * scale[1]));
        if (g < a.group) *reinterpret_cast<uint32_t*>(out + 16 * i + 8 * half) = pair;
      }
    }
  }

  __device__ void store_part(const State& state, float* to) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = sum_of(state.sum[i]);
      const int head = 2 * t + i;
      if (head >= a.group) continue;
      if (g == 0) *reinterpret_cast<float2*>(to + 2 * head) = make_float2(state.max[i], sum);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        to[kPartialStats + head * D + 16 * tile + g] = state.out[tile][i];
        to[kPartialStats + head * D + 16 * tile + 8 + g] = state.out[tile][2 + i];
      }
    }
  }
};

}  // namespace nanoflow::cuda
