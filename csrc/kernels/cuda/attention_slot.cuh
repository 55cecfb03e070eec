#pragma once

#include "kernels/cuda/attention_parts.cuh"

namespace nanoflow::cuda {

/// Where a slot of shared memory holds keys or values, as bulk copies leave them: in rows of 128
/// bytes, each of half a key at head_dim 128, box after box.
template <int D>
struct SlotLayout {
  static constexpr int kRowBytes = 128;
  int box_shift, box_keys;  // of a copy

  /// Of slots of 1 << slot_shift keys.
  __device__ SlotLayout(int page_shift, int slot_shift)
      : box_shift(min(page_shift, slot_shift)), box_keys(1 << box_shift) {}

  /// Where half a key lies, from the slot on; its pieces of 8 dimensions are
  /// swizzled there.
  __device__ uint32_t row_offset(int key, int half) const {
    const int box = key >> box_shift, row = key & (box_keys - 1);
    return ((box * (D / 64) + half) * box_keys + row) * kRowBytes;
  }
  __device__ static uint32_t piece_offset(int key, int piece) {
    return static_cast<uint32_t>(piece % 8 ^ key % 8) << 4;
  }
};

}  // namespace nanoflow::cuda
