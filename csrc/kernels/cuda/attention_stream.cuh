#pragma once

#include "kernels/cuda/attention_line.cuh"
#include "kernels/cuda/attention_maps.h"
#include "kernels/cuda/attention_rows.cuh"
#include "kernels/cuda/bulk_copy.cuh"

// Decodes: each warp streams one KV head's keys of a chunk of the line, kStreamKeys at a time. It
// has slots of its own in shared memory, which bulk copies fill while it works on another, and no
// warp waits for another. Products take keys (S = K qT) and dimensions (outT = VT PT) as the tensor
// cores' rows and query heads as their 8 columns.

namespace nanoflow::cuda {

/// A decode in progress, as lane 4 g + t sees it.
template <int D>
struct StreamState {
  uint32_t q[D / 16][2];  // of head g: dimensions 2 t and 2 t + 1 of each 8
  float out[D / 16][4];   // of heads 2 t and 2 t + 1: dimensions g and g + 8 of each 16
  float max[2];           // of heads 2 t and 2 t + 1: what scores are told relative to, at most
                          // kSlack below the largest
  float shift[2];         // max in powers of two
  float sum[2];           // of this lane's keys
};

template <class T, int D>
struct AttentionStream : AttentionLine {
  static constexpr int kTiles = D / 16;  // of q's columns, and of out's rows
  static constexpr int kBlock = 16;      // keys of a product
  static constexpr int kStreamKeysShift = 5;
  static constexpr int kBlocks = kStreamKeys / kBlock;
  static constexpr float kSlack = 8;               // powers of two by which scores may pass max
  static constexpr int kStats = 2 * kStreamHeads;  // floats: max and sum of each head; out follows
  static constexpr int kPartialFloats = kStats + kStreamHeads * D;
  static constexpr int kSlots = 2;
  static constexpr int kRowBytes = 128;                       // of half a key, at head_dim 128
  static constexpr int kSlotBytes = kStreamKeys * D * 2;      // of keys; their values follow
  static constexpr int kRingBytes = kSlots * 2 * kSlotBytes;  // of a warp
  static constexpr int kSharedBytes = kStreamWarps * kRingBytes;

  const AttentionMaps& maps;
  int g, t;
  int box_shift, box_keys;  // of a copy
  uint32_t ring;            // of this warp
  uint32_t barriers;        // one a slot
  uint64_t policy;

  /// `shared`: kSharedBytes at a multiple of 1024; `barriers_shared`: kSlots for each warp.
  __device__ AttentionStream(const AttentionArguments& arguments, const AttentionMaps& tensor_maps,
                             const AttentionWorkHeader& h, uint32_t shared,
                             uint32_t barriers_shared)
      : AttentionLine(arguments, h),
        maps(tensor_maps),
        g(lane / 4),
        t(lane % 4),
        box_shift(min(arguments.page_shift, kStreamKeysShift)),
        box_keys(1 << box_shift),
        ring(shared + threadIdx.x / 32 * kRingBytes),
        barriers(barriers_shared + threadIdx.x / 32 * kSlots * 8),
        policy(read_once_policy()) {}

  // --- slots ----------------------------------------------------------------------------------

  /// How often the warp has filled slots: tells the slot of a step, and its barrier's phase.
  struct Fills {
    int issued = 0, taken = 0;
  };

  __device__ uint32_t slot(int fill) const { return ring + fill % kSlots * (2 * kSlotBytes); }
  __device__ uint32_t barrier(int fill) const { return barriers + fill % kSlots * 8; }

  /// Starts the copies of a step's keys and values; its slot is free.
  __device__ void fetch(const Cursor& c, Fills& fills) const {
    __syncwarp();  // everybody has done with the slot
    if (lane == 0) {
      const uint32_t to = slot(fills.issued), full = barrier(fills.issued);
      const int boxes = (min(c.left(), kStreamKeys) + box_keys - 1) / box_keys;
      const uint32_t bytes = box_keys * D * 2;
      expect_bytes(full, boxes * 2 * bytes);
      for (int i = 0; i < boxes; ++i) {
        const int key = c.key() + i * box_keys;
        const int page = __ldg(a.page_indices + c.item.page_begin + (key >> a.page_shift));
        const int in_page = key & ((1 << a.page_shift) - 1);
        copy_box(to + i * bytes, maps.k, full, in_page, c.head, page, policy);
        copy_box(to + kSlotBytes + i * bytes, maps.v, full, in_page, c.head, page, policy);
      }
    }
    ++fills.issued;
  }

  /// Where half a key lies, from the slot's keys or values on; its pieces of 8 dimensions are
  /// swizzled there.
  __device__ uint32_t row_offset(int key, int half) const {
    const int box = key >> box_shift, row = key & (box_keys - 1);
    return ((box * (D / 64) + half) * box_keys + row) * kRowBytes;
  }
  __device__ static uint32_t piece_offset(int key, int piece) {
    return static_cast<uint32_t>(piece % 8 ^ key % 8) << 4;
  }

  /// Values of keys [begin, end) become zeros, where the row does not see them: whatever lies there
  /// must not meet a weight of zero.
  __device__ void clear_values(uint32_t values, int begin, int end) const {
    for (int i = lane; i < (end - begin) * (D / 8); i += 32) {
      const int key = begin + i / (D / 8), piece = i % (D / 8);
      store_shared(values + row_offset(key, piece / 8) + piece_offset(key, piece),
                   make_uint4(0, 0, 0, 0));
    }
    fence_for_bulk_copies();
    __syncwarp();
  }

  // --- a step ---------------------------------------------------------------------------------

  /// The first of a decode's query heads that share a KV head, in q or out.
  __device__ int64_t heads_of(const Cursor& c, int64_t stride) const {
    return c.item.row_begin * stride + static_cast<int64_t>(c.head) * a.group * D;
  }

  __device__ void start(StreamState<D>& state, const Cursor& c) const {
    const T* q = static_cast<const T*>(a.q) + heads_of(c, a.q_stride) + g * D + 2 * t;
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
  __device__ void score(float (&s)[kBlocks][4], const StreamState<D>& state, uint32_t keys) const {
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
        load_matrices(
            k, keys + row_offset(b * kBlock + key, i / 4) + piece_offset(key, 2 * i + piece));
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
  __device__ void raise_max(StreamState<D>& state, const float (&top)[2]) const {
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
  __device__ void soften(uint32_t (&weights)[kBlocks][2], StreamState<D>& state,
                         float (&s)[kBlocks][4], int skipped, int left) const {
    const bool is_cut = skipped > 0 || left < kStreamKeys;
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
    const float slack = kSlack / a.scale_log2;
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

  __device__ void add_values(StreamState<D>& state, const uint32_t (&weights)[kBlocks][2],
                             uint32_t values) const {
    const int key = lane / 16 * 8 + lane % 8, piece = lane / 8 % 2;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t v[4];
        load_matrices_transposed(
            v, values + row_offset(b * kBlock + key, i / 4) + piece_offset(key, 2 * i + piece));
        mma_16x8x16<T>(state.out[i], v, weights[b][0], weights[b][1]);
      }
    }
  }

  // --- units ----------------------------------------------------------------------------------

  /// Attends to the keys of a chunk of the line for one head.
  __device__ void run(int unit, Fills& fills) const {
    const int chunk = unit / a.kv_heads, head = unit - chunk * a.kv_heads;
    const int* chunk_begin = list<int>(at.chunk_begin);
    const int begin = chunk_begin[chunk], count = chunk_begin[chunk + 1] - begin;
    if (count == 0) return;
    const int stream = list<int>(at.chunk_stream)[chunk];
    Cursor now = cursor_of(stream, head, begin - list<int>(at.stream_begin)[stream]);
    Cursor ahead = now;
    const auto fetch_next = [&](int step) {  // of the chunk
      if (step >= count) return;
      if (step > 0) advance(ahead);
      fetch(ahead, fills);
    };
    for (int step = 0; step < kSlots; ++step) fetch_next(step);
    StreamState<D> state;
    int first_step = now.step;  // of the current item, by this warp
    for (int i = 0; i < count; ++i) {
      if (i > 0) advance(now);
      if (i == 0 || now.step == 0) {
        first_step = now.step;
        start(state, now);
      }
      const uint32_t keys = slot(fills.taken), values = keys + kSlotBytes;
      wait_barrier(barrier(fills.taken), fills.taken / kSlots % 2);
      ++fills.taken;
      const int skipped = now.skipped(), left = now.left();
      if (skipped > 0) clear_values(values, 0, skipped);
      if (left < kStreamKeys) clear_values(values, left, kStreamKeys);
      float s[kBlocks][4];
      uint32_t weights[kBlocks][2];
      score(s, state, keys);
      soften(weights, state, s, skipped, left);
      add_values(state, weights, values);
      fetch_next(i + kSlots);
      if (now.ends_item() && first_step == 0) {
        finish(state, now);
      } else if (now.ends_item() || i + 1 == count) {
        finish_part(state, now, first_step, unit);
      }
    }
  }

  /// By the first kStreamWarps warps of a CTA, when shared memory is theirs.
  __device__ void run_all() const {
    const int warps = static_cast<int>(gridDim.x) * kStreamWarps;
    const auto warp = static_cast<int>(blockIdx.x * kStreamWarps + threadIdx.x / 32);
    if (lane == 0) {
      for (int i = 0; i < kSlots; ++i) init_barrier(barrier(i), 1);
    }
    fence_for_bulk_copies();
    __syncwarp();
    Fills fills;
    for (int unit = next_unit(warp - warps); unit >= 0; unit = next_unit(unit)) run(unit, fills);
  }

  // --- results --------------------------------------------------------------------------------

  __device__ static float sum_of(float value) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
  }

  __device__ void finish(const StreamState<D>& state, const Cursor& c) const {
    T* out = static_cast<T*>(a.out) + heads_of(c, a.out_stride) + g * D + 2 * t;
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

  /// A unit has room for two parts: of the item it starts with, and of the one it ends with.
  __device__ float* partial(int unit, bool starts_item) const {
    return a.partials + (static_cast<int64_t>(unit) * 2 + starts_item) * kPartialFloats;
  }

  __device__ void store_part(const StreamState<D>& state, float* to) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = sum_of(state.sum[i]);
      const int head = 2 * t + i;
      if (head >= a.group) continue;
      if (g == 0) *reinterpret_cast<float2*>(to + 2 * head) = make_float2(state.max[i], sum);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        to[kStats + head * D + 16 * tile + g] = state.out[tile][i];
        to[kStats + head * D + 16 * tile + 8 + g] = state.out[tile][2 + i];
      }
    }
  }

  /// Stores the part; whoever completes the item merges its parts.
  __device__ void finish_part(const StreamState<D>& state, const Cursor& c, int first_step,
                              int unit) const {
    store_part(state, partial(unit, first_step == 0));
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
    T* const heads = static_cast<T*>(a.out) + heads_of(c, a.out_stride);
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
            values[h][i] = __ldcg(part + kStats + (base + h) * D + i * 32 + lane);
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
