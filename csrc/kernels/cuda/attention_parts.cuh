#pragma once

#include "kernels/cuda/attention_line.cuh"
#include "kernels/cuda/attention_rows.cuh"

// Results of streamed items that cuts of the line divide.

namespace nanoflow::cuda {

inline constexpr int kPartialStats = 2 * kStreamHeads;  // floats: max and sum of each head

/// The first of a decode's query heads that share a KV head, in q or out.
__device__ inline int64_t heads_of(const AttentionArguments& a, const AttentionLine::Cursor& c,
                                   int64_t stride, int head_dim) {
  return c.item.row_begin * stride + static_cast<int64_t>(c.head) * a.group * head_dim;
}

template <class T, int D>
struct AttentionParts : AttentionLine {
  static constexpr int kPartialFloats = kPartialStats + kStreamHeads * D;  // of a part

  __device__ AttentionParts(const AttentionArguments& arguments, const AttentionWorkHeader& h)
      : AttentionLine(arguments, h) {}

  /// A unit has room for two parts: of the item it starts with, and of the one it ends with.
  __device__ float* partial(int unit, bool starts_item) const {
    return a.partials + (static_cast<int64_t>(unit) * 2 + starts_item) * kPartialFloats;
  }

  /// The warp has stored its part, of steps from first_step on: whoever completes the item merges
  /// its parts.
  __device__ void finish_part(const Cursor& c, int first_step, int unit) const {
    int2* progress = list<int2>(at.progress) + c.stream * a.kv_heads + c.head;
    if (lane == 0 && first_step == 0) progress->y = unit / a.kv_heads;
    __threadfence();
    __syncwarp();
    const int own = c.step + 1 - first_step;
    int done = 0;
    if (lane == 0) done = atomicAdd(&progress->x, own) + own;
    if (__shfl_sync(~0u, done, 0) < c.steps) return;
    __threadfence();
    merge_parts(c, __ldcg(&progress->y));
    if (lane == 0) progress->x = 0;  // for the next layer
  }

  /// Adds up the parts of an item, in the order of its keys; `first` is the chunk that starts it.
  __device__ void merge_parts(const Cursor& c, int first) const {
    const int* chunk_begin = list<int>(at.chunk_begin);
    const int end = list<int>(at.stream_begin)[c.stream] + c.steps;
    T* const heads = static_cast<T*>(a.out) + heads_of(a, c, a.out_stride, D);
    constexpr int kOwn = D / 32;  // columns of a lane
    constexpr int kHeads = 2;     // at a time, so that their loads overlap
    for (int base = 0; base < a.group; base += kHeads) {
      float max[kHeads], sum[kHeads] = {}, out[kHeads][kOwn] = {};
#pragma unroll
      for (int h = 0; h < kHeads; ++h) max[h] = -INFINITY;
      for (int chunk = first; chunk_begin[chunk] < end; ++chunk) {
        if (chunk_begin[chunk] == chunk_begin[chunk + 1]) continue;
        const float* part = partial(chunk * a.kv_heads + c.head, chunk == first);
        float2 stats[kHeads];
        float values[kHeads][kOwn];
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {  // heads past the group hold anything
          stats[h] = __ldcg(reinterpret_cast<const float2*>(part + 2 * (base + h)));
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            values[h][i] = __ldcg(part + kPartialStats + (base + h) * D + i * 32 + lane);
          }
        }
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float new_max = fmaxf(max[h], stats[h].x);
          const float keep = exp2_approx((max[h] - shift_of(new_max)) * a.scale_log2);
          const float add = exp2_approx((stats[h].x - shift_of(new_max)) * a.scale_log2);
          sum[h] = sum[h] * keep + stats[h].y * add;
#pragma unroll
          for (int i = 0; i < kOwn; ++i) out[h][i] = out[h][i] * keep + values[h][i] * add;
          max[h] = new_max;
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (base + h >= a.group) break;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          heads[(base + h) * D + i * 32 + lane] = static_cast<T>(out[h][i] / sum[h]);
        }
      }
    }
  }
};

}  // namespace nanoflow::cuda
