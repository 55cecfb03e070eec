#include "kernels/cuda/attention_maps.h"

#include <algorithm>

#include "kernels/cuda/check.h"

namespace nanoflow::cuda {
namespace {

constexpr int kElementBytes = 2;
constexpr int kRowElements = 64;  // of 128 bytes, what the swizzle spans

/// A box holds `keys_of_box` keys, or a smaller page, of so many halves.
CUtensorMap map_of(const void* cache, const AttentionArguments& a, int head_dim, int keys_of_box,
                   int halves_of_box) {
  const auto bytes = [](int64_t elements) {
    return static_cast<cuuint64_t>(elements) * kElementBytes;
  };
  const auto keys = cuuint64_t{1} << a.page_shift;
  const auto halves = static_cast<cuuint64_t>(head_dim / kRowElements);
  const cuuint64_t sizes[] = {kRowElements, keys, halves, static_cast<cuuint64_t>(a.kv_heads),
                              static_cast<cuuint64_t>(a.pages)};
  const cuuint64_t strides[] = {bytes(a.key_stride), bytes(kRowElements), bytes(a.head_stride),
                                bytes(a.page_stride)};
  const cuuint32_t box[] = {kRowElements,
                            std::min(static_cast<cuuint32_t>(keys_of_box), 1u << a.page_shift),
                            static_cast<cuuint32_t>(halves_of_box), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  // The type tells only what zeros of places outside would be: there are none.
  NF_DRIVER_CALL(cuTensorMapEncodeTiled, &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
                 const_cast<void*>(cache), sizes, strides, box, steps,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
}

}  // namespace

AttentionMaps make_attention_maps(const AttentionArguments& a, int head_dim) {
  const int halves = head_dim / kRowElements;
  return {.k = map_of(a.k_cache, a, head_dim, kStreamKeys, halves),
          .v = map_of(a.v_cache, a, head_dim, kStreamKeys, halves),
          .tile_k = map_of(a.k_cache, a, head_dim, kTileKeys, 1),
          .tile_v = map_of(a.v_cache, a, head_dim, kTileKeys, 1)};
}

}  // namespace nanoflow::cuda
