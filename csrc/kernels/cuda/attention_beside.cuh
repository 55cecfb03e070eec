#pragma once

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_stream.cuh"
#include "kernels/cuda/wgmma.cuh"

// Streams on SMs that multiply at the same time (gemm_sm90_beside.cuh): a CTA of one warpgroup an
// SM. Tensor cores take warpgroups' products in the order in which they come; a warp's product
// would wait for them each time, so here many products of a step wait once, together.
//
// Products are of 64 keys and 8 query heads, and 64 dimensions and 8 query heads: S = K qT,
// outT = VT PT. A step's scores are made beside the outputs of the one before.

namespace nanoflow::cuda {

inline constexpr int kBesideStreamRegisters = 128;  // what products leave of a quarter of an SM

__device__ inline int own_sm() {
  int sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  return sm;
}

template <class T, int D>
struct AttentionBeside : AttentionParts<T, D> {
  using Parts = AttentionParts<T, D>;
  using Cursor = AttentionLine::Cursor;
  using Parts::a, Parts::at, Parts::lane;
  static constexpr int kKeys = 64;  // of a block
  static constexpr int kSteps = kKeys / kStreamKeys;
  static constexpr int kHalves = D / 64;
  static constexpr int kRowBytes = 128;
  static constexpr int kEightRows = 8 * kRowBytes;
  static constexpr int kHalfBytes = kKeys * kRowBytes;
  static constexpr int kUnitBytes = kHalves * kHalfBytes;  // a block's keys, or its values
  static constexpr int kUnits = 4;
  static constexpr int kWarps = kBesideWarps;

  struct Shared {  // at a multiple of 1024
    uint4 units[kUnits * kUnitBytes / sizeof(uint4)];
    uint4 q[kHalves * kEightRows / sizeof(uint4)];  // a head a row
    uint4 weights[kEightRows / sizeof(uint4)];      // a head a row, of a block's keys
    float tops[kWarps][kStreamHeads], sums[kWarps][kStreamHeads];
    uint64_t full[kUnits];  // barriers
    int unit;               // of the CTA
    bool is_second;
  };

  /// A decode in progress, as lane 4 g + t of a warp sees it.
  struct State {
    float out[kHalves][4];  // of heads 2 t and 2 t + 1: dimensions g and g + 8 of the warp's 16 in
                            // each 64
    float max[2];           // of those heads: what scores are told relative to, at most kScoreSlack
                            // below the largest
    float shift[2];         // max in powers of two
    float sum[2];           // of this lane's keys
  };

  /// Steps of an item that lie in a chunk.
  struct Segment {
    Cursor c;
    int steps;
    int left;  // steps of the chunk after it

    __device__ int blocks() const { return (steps + kSteps - 1) / kSteps; }
    __device__ int key(int block) const { return c.key() + block * kKeys; }
    /// Keys of a block that there are.
    __device__ int keys(int block) const {
      return min(c.item.kv_len - key(block), min(kKeys, (steps - block * kSteps) * kStreamKeys));
    }
    /// Those before the first that the row sees.
    __device__ int skipped(int block) const { return block == 0 ? c.skipped() : 0; }
  };

  /// The next unit to copy.
  struct Ahead {
    Segment segment;
    int block = 0;
    bool is_value = false, is_over = false;
    int page = 0;  // of the lane's box
  };

  const AttentionMaps& maps;
  Shared& shared;
  int warp, g, t;
  int box_keys;
  uint64_t policy;

  __device__ AttentionBeside(const AttentionArguments& arguments, const AttentionMaps& tensor_maps,
                             const AttentionWorkHeader& h, Shared& memory)
      : Parts(arguments, h),
        maps(tensor_maps),
        shared(memory),
        warp(threadIdx.x / 32),
        g(lane / 4),
        t(lane % 4),
        box_keys(min(1 << arguments.page_shift, kStreamKeys)),
        policy(read_once_policy()) {}

  // --- units ----------------------------------------------------------------------------------

  /// Of the CTA's copies: how many have been started, and how many been done with.
  struct Fills {
    int issued = 0, freed = 0;
  };

  __device__ uint32_t unit(int fill) const {
    return shared_address(shared.units) + fill % kUnits * kUnitBytes;
  }
  __device__ void wait_full(int fill) const {
    wait_barrier(shared_address(&shared.full[fill % kUnits]), fill / kUnits % 2);
  }

  __device__ Segment segment_of(const Cursor& c, int left) const {
    const int steps = min(c.steps - c.step, left);
    return {c, steps, left - steps};
  }

  /// By one warp: lanes copy a box each.
  __device__ void copy_unit(const Ahead& ahead, int fill) const {
    const Segment& segment = ahead.segment;
    const int most = kKeys / box_keys, half = lane / most, box = lane % most;
    const int boxes = (segment.keys(ahead.block) + box_keys - 1) / box_keys;
    const uint32_t full = shared_address(&shared.full[fill % kUnits]);
    if (lane == 0) expect_bytes(full, boxes * kHalves * box_keys * kRowBytes);
    __syncwarp();
    if (half >= kHalves || box >= boxes) return;
    const int key = segment.key(ahead.block) + box * box_keys;
    copy_half(unit(fill) + half * kHalfBytes + box * box_keys * kRowBytes,
              ahead.is_value ? maps.v : maps.k, full, key & ((1 << a.page_shift) - 1), half,
              segment.c.head, ahead.page, policy);
  }

  /// Starts to load what the block's copies need to know: long before they begin.
  __device__ void look_up(Ahead& ahead) const {
    const Segment& segment = ahead.segment;
    const int box = lane % (kKeys / box_keys);
    const int key = min(segment.key(ahead.block) + box * box_keys, segment.c.item.kv_len - 1);
    if (warp == 0) {
      ahead.page = __ldg(a.page_indices + segment.c.item.page_begin + (key >> a.page_shift));
    }
  }

  __device__ void advance(Ahead& ahead) const {
    ahead.is_value = !ahead.is_value;
    if (ahead.is_value) return;
    if (++ahead.block == ahead.segment.blocks()) {
      ahead.block = 0;
      ahead.is_over = ahead.segment.left == 0;
      if (ahead.is_over) return;
      const Cursor next = this->cursor_of(ahead.segment.c.stream + 1, ahead.segment.c.head, 0);
      ahead.segment = segment_of(next, ahead.segment.left);
    }
    look_up(ahead);
  }

  /// Copies as far ahead as there is room.
  __device__ void refill(Ahead& ahead, Fills& fills) const {
    while (!ahead.is_over && fills.issued < fills.freed + kUnits) {
      if (warp == 0) copy_unit(ahead, fills.issued);
      ++fills.issued;
      advance(ahead);
    }
  }

  /// Values of keys [begin, end) become zeros, where the row does not see them: whatever lies there
  /// must not meet a weight of zero.
  __device__ void clear_values(uint32_t values, int begin, int end) const {
    constexpr int kPieces = D / 8;
    for (int i = threadIdx.x; i < (end - begin) * kPieces; i += 32 * kWarps) {
      const int key = begin + i / kPieces, piece = i % kPieces;
      store_shared(values + piece / 8 * kHalfBytes + key * kRowBytes + ((piece ^ key) % 8 << 4),
                   make_uint4(0, 0, 0, 0));
    }
  }

  // --- products -------------------------------------------------------------------------------

  __device__ __forceinline__ void start_scores(float (&s)[1][4], uint32_t keys) const {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint32_t column = k % 4 * 32;
      start_narrow_product<T, Major::K>(
          s[0], matrix_descriptor(keys + k / 4 * kHalfBytes + column, 0),
          matrix_descriptor(shared_address(shared.q) + k / 4 * kEightRows + column, 0), k > 0);
    }
  }

  __device__ __forceinline__ void start_outputs(State& state, uint32_t values) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        start_narrow_product<T, Major::MN>(
            state.out[half],
            matrix_descriptor(values + half * kHalfBytes + k * 16 * kRowBytes, kHalfBytes),
            matrix_descriptor(shared_address(shared.weights) + k * 32, 0), true);
      }
    }
  }

  __device__ void start(State& state, const Cursor& c) const {
    const T* q = static_cast<const T*>(a.q) + heads_of(a, c, a.q_stride, D);
    for (int i = threadIdx.x; i < kStreamHeads * (D / 8); i += 32 * kWarps) {
      const int head = i / (D / 8), piece = i % (D / 8);
      uint4 words = make_uint4(0, 0, 0, 0);
      if (head < a.group) words = *reinterpret_cast<const uint4*>(q + head * D + piece * 8);
      store_shared(shared_address(shared.q) + piece / 8 * kEightRows + head * kRowBytes +
                       ((piece ^ head) % 8 << 4),
                   words);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.out[half][i] = 0;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      state.max[i] = -INFINITY;
      state.shift[i] = state.sum[i] = 0;
    }
    fence_for_async_reads();
    __syncthreads();
  }

  /// Of the lanes of a warp that have the same heads.
  template <class Fold>
  __device__ static float fold_keys(float value, Fold fold) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      value = fold(value, __shfl_xor_sync(~0u, value, lanes));
    }
    return value;
  }

  /// The same of all warps, through shared memory, by all of them.
  template <class Fold>
  __device__ void fold_warps(float (&values)[2], float (&memory)[kWarps][kStreamHeads],
                             Fold fold) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float own = fold_keys(values[i], fold);
      if (g == 0) memory[warp][2 * t + i] = own;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      values[i] = memory[0][2 * t + i];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) values[i] = fold(values[i], memory[w][2 * t + i]);
    }
  }

  /// Sums and outputs so far are told relative to the larger scores from now on.
  __device__ void raise_max(State& state, const float (&s)[4]) const {
    float top[2] = {fmaxf(s[0], s[2]), fmaxf(s[1], s[3])};
    fold_warps(top, shared.tops, [](float x, float y) { return fmaxf(x, y); });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float max = fmaxf(state.max[i], top[i]);
      const float keep = exp2_approx((state.max[i] - shift_of(max)) * a.scale_log2);
      state.max[i] = max;
      state.shift[i] = shift_of(max) * a.scale_log2;
      state.sum[i] *= keep;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        state.out[half][i] *= keep;
        state.out[half][2 + i] *= keep;
      }
    }
  }

  /// The weights of keys [skipped, left), to shared memory. Once all have come here, what products
  /// have read is free.
  __device__ void weigh(State& state, float (&s)[4], int skipped, int left, Ahead& ahead,
                        Fills& fills) const {
    const float slack = kScoreSlack / a.scale_log2;
    bool is_above = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = warp * 16 + g + i / 2 * 8;
      if (key < skipped || key >= left) s[i] = -INFINITY;
      is_above |= s[i] > state.max[i % 2] + slack;
    }
    const bool is_raised = __syncthreads_or(is_above);
    if (is_raised) raise_max(state, s);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = exp2_approx(s[i] * a.scale_log2 - state.shift[i % 2]);
      state.sum[i % 2] += s[i];
    }
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {  // keys
      const uint32_t pair = transpose_matrix(pack<T>(s[2 * eight], s[2 * eight + 1]));
      const uint32_t piece = (2 * warp + eight) ^ g;
      store_word(shared_address(shared.weights) + g * kRowBytes + (piece << 4) + t * 4, pair);
    }
    fence_for_async_reads();
    __syncthreads();
  }

  __device__ static void store_word(uint32_t address, uint32_t word) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
  }

  // --- chunks ---------------------------------------------------------------------------------

  /// Waits for a block's values, of which the row may not see all.
  __device__ void take_values(const Segment& segment, int block, int fill) const {
    wait_full(fill);
    const int skipped = segment.skipped(block), left = segment.keys(block);
    if (skipped == 0 && left == kKeys) return;
    clear_values(unit(fill), 0, skipped);
    clear_values(unit(fill), left, kKeys);
    fence_for_async_reads();
    __syncthreads();
  }

  /// Attends to a segment; `state` tells what came of it.
  __device__ void run(State& state, const Segment& segment, Ahead& ahead, Fills& fills) const {
    const int last = segment.blocks() - 1;
    float s[1][4];
    start(state, segment.c);
    wait_full(fills.freed);
    fence_registers(s);
    cute::warpgroup_arrive();
    start_scores(s, unit(fills.freed));
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence_registers(s);
    ++fills.freed;
    weigh(state, s[0], segment.skipped(0), segment.keys(0), ahead, fills);
    for (int block = 0; block < last; ++block) {
      const int values = fills.freed, keys = values + 1;
      take_values(segment, block, values);
      wait_full(keys);
      fence_registers(s);
      fence_registers(state.out);
      cute::warpgroup_arrive();
      start_scores(s, unit(keys));
      start_outputs(state, unit(values));
      cute::warpgroup_commit_batch();
      refill(ahead, fills);  // what the products before have read
      cute::warpgroup_wait<0>();
      fence_registers(s);
      fence_registers(state.out);
      fills.freed += 2;
      weigh(state, s[0], 0, segment.keys(block + 1), ahead, fills);
    }
    take_values(segment, last, fills.freed);
    fence_registers(state.out);
    cute::warpgroup_arrive();
    start_outputs(state, unit(fills.freed));
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence_registers(state.out);
    ++fills.freed;
    __syncthreads();  // all have read
    refill(ahead, fills);
  }

  __device__ void run_chunk(int index, Fills& fills) const {
    const int chunk = index / a.kv_heads, head = index - chunk * a.kv_heads;
    const int* chunk_begin = this->template list<int>(at.chunk_begin);
    const int begin = chunk_begin[chunk], count = chunk_begin[chunk + 1] - begin;
    if (count == 0) return;
    const int stream = this->template list<int>(at.chunk_stream)[chunk];
    const int stream_begin = this->template list<int>(at.stream_begin)[stream];
    Segment now = segment_of(this->cursor_of(stream, head, begin - stream_begin), count);
    Ahead ahead{.segment = now};
    look_up(ahead);
    refill(ahead, fills);
    for (;;) {
      State state;
      run(state, now, ahead, fills);
      fold_warps(state.sum, shared.sums, [](float x, float y) { return x + y; });
      if (now.steps == now.c.steps) {
        finish(state, now.c);
      } else {
        store_part(state, this->partial(index, now.c.step == 0));
        __threadfence();
        __syncthreads();
        Cursor last = now.c;
        last.step += now.steps - 1;
        if (warp == 0) this->finish_part(last, now.c.step, index);
      }
      if (now.left == 0) return;
      now = segment_of(this->cursor_of(now.c.stream + 1, head, 0), now.left);
    }
  }

  /// By all of a CTA.
  __device__ void run_all() const {
    if (threadIdx.x == 0) {
      for (uint64_t& full : shared.full) init_barrier(shared_address(&full), 1);
    }
    fence_for_bulk_copies();
    Fills fills;
    for (;;) {
      __syncthreads();
      if (warp == 0) {
        const int next = this->next_unit(-static_cast<int>(gridDim.x) * kStreamWarps);
        if (lane == 0) shared.unit = next;
      }
      __syncthreads();
      const int index = shared.unit;
      if (index < 0) return;
      run_chunk(index, fills);
    }
  }

  // --- results --------------------------------------------------------------------------------

  __device__ int first_dim(int half) const { return half * 64 + warp * 16; }

  __device__ void finish(const State& state, const Cursor& c) const {
    T* out = static_cast<T*>(a.out) + heads_of(a, c, a.out_stride, D) + g * D + 2 * t;
    const float scale[2] = {1.0f / state.sum[0], 1.0f / state.sum[1]};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* const pair = state.out[half] + 2 * i;
        const uint32_t packed = transpose_matrix(pack<T>(pair[0] * scale[0], pair[1] * scale[1]));
        if (g < a.group) *reinterpret_cast<uint32_t*>(out + first_dim(half) + 8 * i) = packed;
      }
    }
  }

  __device__ void store_part(const State& state, float* to) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 2 * t + i;
      if (head >= a.group) continue;
      if (warp == 0 && g == 0) {
        *reinterpret_cast<float2*>(to + 2 * head) = make_float2(state.max[i], state.sum[i]);
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        float* const out = to + kPartialStats + head * D + first_dim(half) + g;
        out[0] = state.out[half][i];
        out[8] = state.out[half][2 + i];
      }
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(32 * kStreamWarps, 1)
    stream_attention(const __grid_constant__ AttentionArguments a,
                     const __grid_constant__ AttentionMaps maps) {
  using Stream = AttentionStream<MmaSteps<T, D>>;
  extern __shared__ __align__(1024) uint4 shared_memory[];
  __shared__ uint64_t barriers[kStreamWarps * Stream::kSlots];
  const auto header = *reinterpret_cast<const AttentionWorkHeader*>(a.work);
  Stream(a, maps, header, shared_address(shared_memory), shared_address(barriers)).run_all();
}

/// One CTA an SM. No chunk has an owner, as a CTA ends at once where another one is on its SM
/// already: two would keep products off it.
template <class T, int D>
__global__ void __maxnreg__(kBesideStreamRegisters)
    stream_beside(const __grid_constant__ AttentionArguments a,
                  const __grid_constant__ AttentionMaps maps) {
  using Stream = AttentionBeside<T, D>;
  extern __shared__ __align__(1024) uint4 shared_memory[];
  auto& shared = *reinterpret_cast<typename Stream::Shared*>(shared_memory);
  auto* const header = reinterpret_cast<AttentionWorkHeader*>(a.work);
  const Stream stream(a, maps, *header, shared);
  int* const resident = stream.template list<int>(stream.at.resident) + own_sm();
  if (threadIdx.x == 0) shared.is_second = atomicExch(resident, 1) != 0;
  __syncthreads();
  if (!shared.is_second) {
    stream.run_all();
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(resident, 0);
  }
  if (threadIdx.x == 0 && atomicAdd(&header->left, 1) + 1 == static_cast<int>(gridDim.x)) {
    header->taken = header->left = 0;  // as it was, for the next layer
  }
}

}  // namespace nanoflow::cuda
