#include "kernels/cuda/attention_maps.h"

#include "kernels/cuda/check.h"

namespace nanoflow::cuda {
namespace {

constexpr int kElementBytes = 2;
constexpr int kRowElements = 64;  // of 128 bytes, what the swizzle spans

CUtensorMap map_of(const void* cache, const AttentionArguments& a, int head_dim) {
  const auto bytes = [](int64_t elements) {
    return static_cast<cuuint64_t>(elements) * kElementBytes;
  };
  const auto keys = cuuint64_t{1} << a.page_shift;
  const auto halves = static_cast<cuuint32_t>(head_dim / kRowElements);
  const cuuint64_t sizes[] = {kRowElements, keys, halves, static_cast<cuuint64_t>(a.kv_heads),
                              static_cast<cuuint64_t>(a.pages)};
  const cuuint64_t strides[] = {bytes(a.key_stride), bytes(kRowElements), bytes(a.head_stride),
                                bytes(a.page_stride)};
  const cuuint32_t box[] = {kRowElements, static_cast<cuuint32_t>(box_keys(a.page_shift)), halves,
                            1, 1};
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

AttentionMaps make_attention_maps(const AttentionArguments& arguments, int head_dim) {
  return {.k = map_of(arguments.k_cache, arguments, head_dim),
          .v = map_of(arguments.v_cache, arguments, head_dim)};
}

}  // namespace nanoflow::cuda
