#pragma once

#include <cuda.h>

#include "kernels/cuda/attention.h"

namespace nanoflow::cuda {

/// How bulk copies find keys and values: as halves of 64 dimensions, in rows of 128 bytes,
/// swizzled. A box is kStreamKeys keys of a page and a head, or all keys of a smaller page; for
/// tiles it is one half of up to kTileKeys keys.
struct AttentionMaps {
  CUtensorMap k, v;
  CUtensorMap tile_k, tile_v;
};

AttentionMaps make_attention_maps(const AttentionArguments& arguments, int head_dim);

}  // namespace nanoflow::cuda
