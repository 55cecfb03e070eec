#pragma once

#include "kernels/cuda/attention_tile_ring.cuh"

namespace nanoflow::cuda {

/// The warp that copies: queries, keys and values of one tile after the other, as far ahead as
/// there is room.
template <class T, int D>
struct TileCopies {
  using Ring = TileRing<D>;
  static constexpr int kTileKeysShift = 6;
  static constexpr int kPieces = D / 8;  // of a key

  const AttentionArguments& a;
  const AttentionMaps& maps;
  AttentionWorkHeader header;
  AttentionWork at;
  Ring ring;
  int lane;
  int box_shift, boxes;  // keys of a box; boxes of a slot, of each half

  __device__ TileCopies(const AttentionArguments& arguments, const AttentionMaps& tensor_maps,
                        const AttentionWorkHeader& h, const Ring& tile_ring)
      : a(arguments),
        maps(tensor_maps),
        header(h),
        at(AttentionWork::of(h.requests, arguments.kv_heads, h.ctas)),
        ring(tile_ring),
        lane(threadIdx.x % 32),
        box_shift(min(arguments.page_shift, kTileKeysShift)),
        boxes(kTileKeys >> box_shift) {}

  template <class Element>
  __device__ Element* list(size_t offset) const {
    return reinterpret_cast<Element*>(a.work + offset);
  }

  /// How often the warp has filled the room for queries, and slots.
  struct Fills {
    int queries = 0, slots = 0;
  };

  __device__ int page_of(const AttentionItem& item, int key) const {
    return key < item.kv_len ? __ldg(a.page_indices + item.page_begin + (key >> a.page_shift)) : 0;
  }

  /// Hands over a job and its queries; rows past the last stay what they are, and nobody asks.
  __device__ void copy_queries(const TileJob& job, Fills& fills) const {
    wait_barrier(shared_address(&ring.shared.queries_empty), fills.queries++ % 2 ^ 1);
    const uint32_t full = shared_address(&ring.shared.queries_full);
    const PackedRows rows = rows_of(a, job, a.q_stride, D);
    const int first = job.index * kTileRows, count = min(rows.count - first, kTileRows);
    if (lane == 0) {
      ring.shared.job = job;
      expect_bytes(full, count * D * 2);
    }
    __syncwarp();
    for (int row = lane; row < count; row += 32) {
      copy_bytes(ring.queries() + row * Ring::kQueryPitch,
                 static_cast<const T*>(a.q) + rows.element(first + row, D), D * 2, full);
    }
  }

  /// A step's keys or values: lanes copy a box each, of a page that they know.
  __device__ void copy_boxes(const CUtensorMap& map, const TileJob& job, int step, int page,
                             Fills& fills) const {
    const int left = job.item.kv_len - step * kTileKeys;  // keys
    const int half = lane / boxes, key = lane % boxes << box_shift;
    const int full_boxes = (min(left, kTileKeys) + (1 << box_shift) - 1) >> box_shift;
    ring.wait_empty(fills.slots);
    if (lane == 0) expect_bytes(ring.full(fills.slots), (full_boxes << box_shift) * D * 2);
    __syncwarp();
    if (half < Ring::kHalves && key < left) {
      copy_half(ring.slot(fills.slots) + Ring::piece(key, half, 0), map, ring.full(fills.slots),
                (step * kTileKeys + key) & ((1 << a.page_shift) - 1), half, job.head, page);
    }
    ++fills.slots;
  }

  /// The same from pages of fewer keys than the swizzle spans.
  __device__ void copy_pieces(const void* cache, const TileJob& job, int step, Fills& fills) const {
    ring.wait_empty(fills.slots);
    for (int i = lane; i < kTileKeys * kPieces; i += 32) {
      const int row = i / kPieces, piece = i % kPieces, key = step * kTileKeys + row;
      const int64_t element = page_of(job.item, key) * a.page_stride + job.head * a.head_stride +
                              (key & ((1 << a.page_shift) - 1)) * a.key_stride + piece * 8;
      copy_async(ring.slot(fills.slots) + Ring::piece(row, piece / 8, piece % 8),
                 static_cast<const T*>(cache) + element, key < job.item.kv_len);
    }
    copy_async_commit();
    copy_async_wait<0>();
    fence_for_async_reads();
    __syncwarp();
    if (lane == 0) arrive(ring.full(fills.slots));
    ++fills.slots;
  }

  __device__ void run(const TileJob& job, Fills& fills) const {
    copy_queries(job, fills);
    const TileSpan span = span_of(job.item, job.index, a.group, a.window);
    if (a.page_shift < kLeastPageShift) {
      for (int step = span.begin; step < span.end; ++step) {
        copy_pieces(a.k_cache, job, step, fills);
        copy_pieces(a.v_cache, job, step, fills);
      }
      return;
    }
    int pages = 0;  // of 32 boxes
    for (int step = span.begin; step < span.end; ++step) {
      const int box = (step - span.begin) * boxes % 32;
      if (box == 0) pages = page_of(job.item, step * kTileKeys + (lane << box_shift));
      const int page = __shfl_sync(~0u, pages, box + lane % boxes);
      copy_boxes(maps.tile_k, job, step, page, fills);
      copy_boxes(maps.tile_v, job, step, page, fills);
    }
  }

  /// The tiles of each of the plan's CTAs; what is to be streamed, too, where nothing can be.
  __device__ void run_all() const {
    if (lane == 0) {
      prefetch_map(maps.tile_k);
      prefetch_map(maps.tile_v);
    }
    Fills fills;
    const int tiles = header.num_tiles * a.kv_heads;
    for (int cta = blockIdx.x; cta < header.ctas; cta += gridDim.x) {
      for (int i = 0; i * header.ctas < tiles; ++i) {
        const int pair = tile_of_cta(cta, i, header.ctas);
        if (pair >= tiles) continue;
        const AttentionTile tile = list<AttentionTile>(at.tiles)[pair / a.kv_heads];
        run({list<AttentionItem>(at.tile_items)[tile.item], tile.index, pair % a.kv_heads}, fills);
      }
    }
    if (!can_stream(D, a.page_shift)) {
      for (int i = blockIdx.x; i < header.num_streams * a.kv_heads; i += gridDim.x) {
        run({list<AttentionItem>(at.stream_items)[i / a.kv_heads], 0, i % a.kv_heads}, fills);
      }
    }
    wait_barrier(shared_address(&ring.shared.queries_empty), fills.queries % 2 ^ 1);
    if (lane == 0) {
      ring.shared.job.index = -1;
      arrive(shared_address(&ring.shared.queries_full));
    }
  }
};

}  // namespace nanoflow::cuda
