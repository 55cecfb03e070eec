#pragma once

#include <type_traits>

#include "kernels/cuda/attention_tile_queries.cuh"

namespace nanoflow::cuda {

/// The two warpgroups that multiply, 64 packed rows each: the product of a step's weights and
/// values runs while the next step's weights are made, and the other warpgroup's products beside
/// both.
template <class T, int D>
struct TileProducts {
  using Ring = TileRing<D>;
  using Rows = RowState<D>;
  using Queries = std::conditional_t<Ring::kQueriesStay, SharedQueries<T, D>, HeldQueries<T, D>>;
  using Scores = TileScores;
  using Weights = uint32_t[kTileKeys / 16][4];

  const AttentionArguments& a;
  Ring ring;
  int lane, warp, group;  // group: the warpgroup

  __device__ TileProducts(const AttentionArguments& arguments, const Ring& tile_ring)
      : a(arguments),
        ring(tile_ring),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        group(warp / 4) {}

  /// How often slots have been taken, and values been looked at.
  struct Taken {
    int slots = 0, looks = 0;
  };

  __device__ __forceinline__ void start_outputs(Rows& rows, const Weights& p,
                                                uint32_t values) const {
#pragma unroll
    for (int n = 0; n < kTileKeys / 16; ++n) {
      start_product<T, Major::MN>(
          rows.out, p[n], matrix_descriptor(values + n * 16 * Ring::kRowBytes, Ring::kHalfBytes),
          true);
    }
    cute::warpgroup_commit_batch();
  }

  // --- values that are not finite ---------------------------------------------------------------

  /// Keys, one a bit, of which some value is an infinity or NaN. By all of a warpgroup: a thread
  /// looks at every other half of a key.
  __device__ uint64_t keys_not_finite(uint32_t values, Taken& taken) const {
    const int key = threadIdx.x % kTileKeys;
    uint32_t found = 0;
    for (int half = threadIdx.x % kGroupThreads / kTileKeys; half < Ring::kHalves; half += 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint4 words = load_shared(values + Ring::piece(key, half, i));
        found |= non_finite<T>(words.x) | non_finite<T>(words.y) | non_finite<T>(words.z) |
                 non_finite<T>(words.w);
      }
    }
    const uint32_t keys = __ballot_sync(~0u, found != 0);
    uint32_t* const all = ring.shared.not_finite[taken.looks++ % 2];  // who is slow reads the other
    if (lane == 0) all[warp] = keys;
    meet_group(group);
    const uint32_t* const own = all + group * 4;
    return uint64_t{own[1] | own[3]} << 32 | (own[0] | own[2]);
  }

  __device__ static uint64_t bits_below(int n) {
    return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << max(n, 0)) - 1;
  }

  /// Waits for a step's values. Where some row of the tile does not see all keys, those that are
  /// not finite are made zeros, because zero times infinity would spoil this row too, and the rows
  /// that see them become NaN.
  __device__ void take_values(Rows& rows, int step, int fill, const Limits& limits,
                              Taken& taken) const {
    ring.wait_full(fill);
    const int begin = step * kTileKeys;
    if (limits.all_see(begin, begin + kTileKeys)) return;
    const uint64_t keys = keys_not_finite(ring.slot(fill), taken);
    if (keys == 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int left = rows.limit[half] - begin;
      const uint64_t seen = bits_below(left) & ~bits_below(left - limits.window);
      if ((keys & seen) == 0) continue;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) rows.out[n][2 * half] = rows.out[n][2 * half + 1] = NAN;
    }
    sync_threads(kBothBarrier, 2 * kGroupThreads);  // both have looked
    for (int i = threadIdx.x; i < kTileKeys * (D / 8); i += 2 * kGroupThreads) {
      const int key = i / (D / 8), piece = i % (D / 8);
      if ((keys >> key & 1) == 0) continue;
      store_shared(ring.slot(fill) + Ring::piece(key, piece / 8, piece % 8),
                   make_uint4(0, 0, 0, 0));
    }
    fence_for_async_reads();
    sync_threads(kBothBarrier, 2 * kGroupThreads);
  }

  // --- tiles ------------------------------------------------------------------------------------

  __device__ void run(const TileJob& job, Taken& taken) const {
    Queries q;
    q.take(ring);
    const PackedRows out = rows_of(a, job, a.out_stride, D);
    const int base = job.index * kTileRows + warp * 16;
    const int visible = job.item.kv_len - job.item.row_count + 1;
    const TileSpan span = span_of(job.item, job.index, a.group, a.window);
    const Limits tile{span.least, span.most, a.window};
    const Limits own{visible + base / a.group,
                     visible + min((base + 15) / a.group, job.item.row_count - 1), a.window};
    Rows rows;
    start_rows(rows, base, out.count, a.group, visible);
    Scores s;
    Weights p;
    float keep[2];
    const auto make_weights = [&](int step) {
      const int begin = step * kTileKeys;
      if (!own.all_see(begin, begin + kTileKeys)) mask_scores<D>(s, rows, begin, a.window);
      weigh(rows, s, keep, a.scale_log2);
    };
    int fill = taken.slots;  // of a step's keys; its values are the next
    ring.wait_full(fill);
    q.fence();
    cute::warpgroup_arrive();
    q.start_scores(s, ring.slot(fill));
    cute::warpgroup_wait<0>();
    fence_registers(s);
    ring.release(fill);
    make_weights(span.begin);
    pack_weights<T>(p, s);
    if (span.begin + 1 < span.end) ring.wait_full(fill + 2);
    for (int step = span.begin; step + 1 < span.end; ++step, fill += 2) {
      take_values(rows, step, fill + 1, tile, taken);
      fence_registers(p);
      fence_registers(rows.out);
      cute::warpgroup_arrive();
      q.start_scores(s, ring.slot(fill + 2));
      start_outputs(rows, p, ring.slot(fill + 1));
      cute::warpgroup_wait<1>();
      fence_registers(s);
      ring.release(fill + 2);
      make_weights(step + 1);
      fence_registers(s);
      for (float& sum : rows.sum) cute::warpgroup_fence_operand(sum);
      // Weights are made by here: what follows a branch is not moved before them.
      if (step + 2 < span.end) ring.wait_full(fill + 4);
      cute::warpgroup_wait<0>();
      fence_registers(rows.out);
      ring.release(fill + 1);
      keep_outputs(rows, keep);
      pack_weights<T>(p, s);
    }
    q.leave(ring);
    take_values(rows, span.end - 1, fill + 1, tile, taken);
    fence_registers(p);
    fence_registers(rows.out);
    cute::warpgroup_arrive();
    start_outputs(rows, p, ring.slot(fill + 1));
    cute::warpgroup_wait<0>();
    fence_registers(rows.out);
    ring.release(fill + 1);
    taken.slots = fill + 2;
    finish_rows(rows, static_cast<T*>(a.out), out, base);
  }

  __device__ void run_all() const {
    Taken taken;
    for (int jobs = 0;; ++jobs) {
      wait_barrier(shared_address(&ring.shared.queries_full), jobs % 2);
      const TileJob job = ring.shared.job;
      if (job.index < 0) return;
      run(job, taken);
    }
  }
};

}  // namespace nanoflow::cuda
