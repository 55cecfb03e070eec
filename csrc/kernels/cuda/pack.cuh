#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string_view>

#include "core/error.h"
#include "core/tensor.h"

// Rows of 16-bit floats, read and written 16 bytes at a time.

namespace nanoflow::cuda {

inline constexpr int kPack = 8;  // elements of a 16-byte access

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}

/// What RmsNorm makes of a normalised value, its weight and what it is added to.
template <typename T>
__device__ T weigh_normal(float normal, T weight, bool unit_offset, float old = 0) {
  if (unit_offset) return from_float<T>(normal * (1.0f + to_float(weight)) + old);
  return from_float<T>(to_float(from_float<T>(normal)) * to_float(weight) + old);
}

/// Eight values in registers.
template <typename T>
union Pack {
  uint4 raw;
  T values[kPack];

  __device__ Pack() : raw{} {}
  __device__ explicit Pack(const T* from) : raw(*reinterpret_cast<const uint4*>(from)) {}
  __device__ void store(T* to) const { *reinterpret_cast<uint4*>(to) = raw; }
};

/// Calls fn(TypeTag<T>{}) with CUDA's type of a 16-bit dtype.
template <typename Fn>
void dispatch_half(DType dtype, std::string_view op, Fn&& fn) {
  if (dtype == DType::kBF16) {
    fn(TypeTag<__nv_bfloat16>{});
  } else if (dtype == DType::kF16) {
    fn(TypeTag<__half>{});
  } else {
    fail(op, " on a GPU does not support dtype ", dtype, "; use bfloat16 or float16");
  }
}

/// Throws Error unless all rows of the tensor begin at, and are, multiples of 16 bytes.
inline void check_packs(std::string_view op, std::string_view name, const Tensor& tensor) {
  const auto item = static_cast<int64_t>(size_of(tensor.dtype()));
  bool is_packed = reinterpret_cast<uintptr_t>(tensor.bytes()) % sizeof(uint4) == 0;
  const auto check = [&](int64_t step) {
    is_packed = is_packed && step * item % static_cast<int64_t>(sizeof(uint4)) == 0;
  };
  check(tensor.size(tensor.dims() - 1));
  for (int dim = 0; dim + 1 < tensor.dims(); ++dim) {
    if (tensor.size(dim) > 1) check(tensor.stride(dim));
  }
  NF_CHECK(is_packed, op, " on a GPU needs rows of ", name,
           " that begin at multiples of 16 bytes; ", tensor, " has a row of ",
           tensor.size(tensor.dims() - 1) * item, " bytes at ",
           static_cast<const void*>(tensor.bytes()));
}

}  // namespace nanoflow::cuda
