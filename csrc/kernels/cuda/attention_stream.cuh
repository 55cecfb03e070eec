#pragma once

#include <bit>

#include "kernels/cuda/attention_maps.h"
#include "kernels/cuda/attention_slot.cuh"
#include "kernels/cuda/bulk_copy.cuh"

// Decodes: each warp streams one KV head's keys of a chunk of the line, a slot at a time. It has
// slots of its own in shared memory, which bulk copies fill while it works on another, and no warp
// waits for another. What it does with a slot is Steps's.

namespace nanoflow::cuda {

template <class Steps>
struct AttentionStream : AttentionParts<typename Steps::Element, Steps::kHeadDim> {
  using T = typename Steps::Element;
  static constexpr int D = Steps::kHeadDim;
  using Parts = AttentionParts<T, D>;
  using Cursor = AttentionLine::Cursor;
  using Parts::a, Parts::at, Parts::lane;
  static constexpr int kKeys = Steps::kKeys;  // of a slot
  static constexpr int kSlots = 2;
  static constexpr int kSlotBytes = kKeys * D * 2;            // of keys; their values follow
  static constexpr int kRingBytes = kSlots * 2 * kSlotBytes;  // of a warp

  const AttentionMaps& maps;
  SlotLayout<D> layout;
  Steps steps;
  uint32_t ring;      // of this warp
  uint32_t barriers;  // one a slot
  uint64_t policy;

  /// `shared`: kRingBytes for each warp at a multiple of 1024; `barriers_shared`: kSlots for each.
  template <class... More>
  __device__ AttentionStream(const AttentionArguments& arguments, const AttentionMaps& tensor_maps,
                             const AttentionWorkHeader& h, uint32_t shared,
                             uint32_t barriers_shared, const More&... more)
      : Parts(arguments, h),
        maps(tensor_maps),
        layout(arguments.page_shift, std::countr_zero(static_cast<unsigned>(kKeys))),
        steps(arguments, layout, more...),
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

  /// A slot's keys: of a step of the chunk, where the line's cursor stands, from `first` on.
  struct Place {
    Cursor cursor;
    int step = 0, first = 0;

    __device__ int key() const { return cursor.key() + first; }
    __device__ int left() const { return cursor.left() - first; }
    __device__ int skipped() const { return max(cursor.skipped() - first, 0); }
    __device__ bool ends_step() const { return first + kKeys == kStreamKeys || left() <= kKeys; }
  };

  /// To the next of the chunk's `count` steps.
  __device__ void advance(Place& place, int count) const {
    if (!place.ends_step()) {
      place.first += kKeys;
      return;
    }
    place.first = 0;
    if (++place.step < count) Parts::advance(place.cursor);
  }

  /// Starts the copies of a slot's keys and values; it is free.
  __device__ void fetch(const Place& place, Fills& fills) const {
    __syncwarp();  // everybody has done with the slot
    if (lane == 0) {
      const Cursor& c = place.cursor;
      const uint32_t to = slot(fills.issued), full = barrier(fills.issued);
      const int box_keys = layout.box_keys;
      const int boxes = (min(place.left(), kKeys) + box_keys - 1) / box_keys;
      const uint32_t bytes = box_keys * D * 2;
      expect_bytes(full, boxes * 2 * bytes);
      for (int i = 0; i < boxes; ++i) {
        const int key = place.key() + i * box_keys;
        const int page = __ldg(a.page_indices + c.item.page_begin + (key >> a.page_shift));
        const int in_page = key & ((1 << a.page_shift) - 1);
        copy_box(to + i * bytes, maps.k, full, in_page, c.head, page, policy);
        copy_box(to + kSlotBytes + i * bytes, maps.v, full, in_page, c.head, page, policy);
      }
    }
    ++fills.issued;
  }

  /// Values of keys [begin, end) become zeros, where the row does not see them: whatever lies there
  /// must not meet a weight of zero.
  __device__ void clear_values(uint32_t values, int begin, int end) const {
    for (int i = lane; i < (end - begin) * (D / 8); i += 32) {
      const int key = begin + i / (D / 8), piece = i % (D / 8);
      store_shared(values + layout.row_offset(key, piece / 8) + layout.piece_offset(key, piece),
                   make_uint4(0, 0, 0, 0));
    }
    fence_for_bulk_copies();
    __syncwarp();
  }

  // --- units ----------------------------------------------------------------------------------

  /// Attends to the keys of a chunk of the line for one head.
  __device__ void run(int unit, Fills& fills) const {
    const int chunk = unit / a.kv_heads, head = unit - chunk * a.kv_heads;
    const int* chunk_begin = this->template list<int>(at.chunk_begin);
    const int begin = chunk_begin[chunk], count = chunk_begin[chunk + 1] - begin;
    if (count == 0) return;
    const int stream = this->template list<int>(at.chunk_stream)[chunk];
    const int stream_begin = this->template list<int>(at.stream_begin)[stream];
    Place now{.cursor = this->cursor_of(stream, head, begin - stream_begin)};
    Place ahead = now;
    const auto fetch_next = [&] {
      if (ahead.step >= count) return;
      fetch(ahead, fills);
      advance(ahead, count);
    };
    for (int i = 0; i < kSlots; ++i) fetch_next();
    typename Steps::State state;
    int first_step = now.cursor.step;  // of the current item, by this warp
    while (now.step < count) {
      const Cursor& c = now.cursor;
      if (now.first == 0 && (now.step == 0 || c.step == 0)) {
        first_step = c.step;
        steps.start(state, c);
      }
      const uint32_t keys = slot(fills.taken), values = keys + kSlotBytes;
      wait_barrier(barrier(fills.taken), fills.taken / kSlots % 2);
      ++fills.taken;
      const int skipped = now.skipped(), left = now.left();
      if (skipped > 0) clear_values(values, 0, min(skipped, kKeys));
      if (left < kKeys) clear_values(values, left, kKeys);
      steps.attend(state, keys, values, skipped, left);
      fetch_next();
      if (now.ends_step()) {
        if (c.ends_item() && first_step == 0) {
          steps.finish(state, c);
        } else if (c.ends_item() || now.step + 1 == count) {
          steps.store_part(state, this->partial(unit, first_step == 0));
          this->finish_part(c, first_step, unit);
        }
      }
      advance(now, count);
    }
  }

  /// By the first warps of a CTA, when shared memory is theirs.
  __device__ void run_all() const {
    const int warps = static_cast<int>(gridDim.x) * kStreamWarps;
    const auto warp = static_cast<int>(blockIdx.x * kStreamWarps + threadIdx.x / 32);
    if (lane == 0) {
      for (int i = 0; i < kSlots; ++i) init_barrier(barrier(i), 1);
    }
    fence_for_bulk_copies();
    __syncwarp();
    Fills fills;
    for (int unit = this->next_unit(warp - warps); unit >= 0; unit = this->next_unit(unit)) {
      run(unit, fills);
    }
  }
};

}  // namespace nanoflow::cuda
