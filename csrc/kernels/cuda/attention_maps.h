#pragma once

#include <cuda.h>

#include "kernels/cuda/attention.h"

namespace nanoflow::cuda {

/// How bulk copies find keys and values. A box is kStreamKeys keys of a page and a head, or all
/// keys of a smaller page, as halves of 64 dimensions: rows of 128 bytes, swizzled.
struct AttentionMaps {
  CUtensorMap k, v;
};

/// Keys of a box.
inline int box_keys(int page_shift) {
  return (1 << page_shift) < kStreamKeys ? 1 << page_shift : kStreamKeys;
}

AttentionMaps make_attention_maps(const AttentionArguments& arguments, int head_dim);

}  // namespace nanoflow::cuda
