#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string_view>

#include "core/error.h"

namespace nanoflow {

enum class DType : uint8_t {
  kF32,   // 4 bytes, activations and logits on any backend
  kBF16,  // 2 bytes, upper half of an f32
  kF16,   // 2 bytes, IEEE half
  kI32,   // 4 bytes, tokens, positions, page tables
  kU64,   // 8 bytes, random seeds
};

/// Storage of a bfloat16; arithmetic is done in float.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float value) {
    uint32_t u = std::bit_cast<uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) {  // NaN stays NaN
      bits = static_cast<uint16_t>((u >> 16) | 0x40u);
      return;
    }
    u += 0x7fffu + ((u >> 16) & 1u);  // round to nearest, ties to even
    bits = static_cast<uint16_t>(u >> 16);
  }
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

using Float16 = _Float16;

size_t size_of(DType dtype);
/// Elements that hold so many bytes, the last perhaps in part.
inline int64_t elements_for(DType dtype, size_t bytes) {
  return static_cast<int64_t>((bytes + size_of(dtype) - 1) / size_of(dtype));
}
std::string_view to_string(DType dtype);
/// Accepts torch's names ("float32", "bfloat16", "float16", "int32", "uint64"); throws on others.
DType parse_dtype(std::string_view name);
std::ostream& operator<<(std::ostream& out, DType dtype);

template <typename T>
struct TypeTag {
  using type = T;
};

/// Calls fn(TypeTag<T>{}) with the C++ type of a floating dtype; otherwise an Error that names
/// `what`.
template <typename Fn>
decltype(auto) dispatch_float(DType dtype, std::string_view what, Fn&& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(TypeTag<float>{});
    case DType::kBF16:
      return fn(TypeTag<BFloat16>{});
    case DType::kF16:
      return fn(TypeTag<Float16>{});
    default:
      fail(what, " does not support dtype ", dtype, "; use float32, bfloat16 or float16");
  }
}

}  // namespace nanoflow
