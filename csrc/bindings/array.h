#pragma once

#include <pybind11/numpy.h>

#include <array>
#include <cstdint>
#include <string>

#include "core/error.h"
#include "core/tensor.h"

// The only place where NumPy arrays become Tensors.

namespace nanoflow {

/// float32, float16, int32, uint64, or uint16 for the bits of bfloat16.
inline DType dtype_of(const pybind11::array& array) {
  const pybind11::dtype dtype = array.dtype();
  if (dtype.byteorder() != '>') {
    const char kind = dtype.kind();
    const pybind11::ssize_t bytes = dtype.itemsize();
    if (kind == 'f' && bytes == 4) return DType::kF32;
    if (kind == 'f' && bytes == 2) return DType::kF16;
    if (kind == 'u' && bytes == 2) return DType::kBF16;
    if (kind == 'i' && bytes == 4) return DType::kI32;
    if (kind == 'u' && bytes == 8) return DType::kU64;
  }
  fail("arrays of ", std::string(pybind11::str(dtype)),
       " are not supported; use float32, float16, uint16 (bfloat16 bits), int32 or uint64");
}

/// The array's own memory as a host tensor, strides included: no copy, and valid as long as the
/// array.
inline Tensor as_tensor(const pybind11::array& array) {
  const DType dtype = dtype_of(array);
  const pybind11::ssize_t dims = array.ndim();
  NF_CHECK(dims >= 1 && dims <= Tensor::kMaxDims, "an array of ", dims, " dimensions; use 1 to ",
           Tensor::kMaxDims);
  std::array<int64_t, Tensor::kMaxDims> shape{}, strides{};
  for (pybind11::ssize_t dim = dims - 1; dim >= 0; --dim) {
    shape[dim] = array.shape(dim);
    NF_CHECK(array.strides(dim) % array.itemsize() == 0, "dimension ", dim,
             " of an array has a stride of ", array.strides(dim),
             " bytes, no multiple of its items' ", array.itemsize());
    // NumPy gives any stride to a dimension that is never walked along: here that of dense rows.
    const int64_t dense = dim + 1 < dims ? strides[dim + 1] * shape[dim + 1] : 1;
    strides[dim] = shape[dim] > 1 ? array.strides(dim) / array.itemsize() : dense;
  }
  const auto count = static_cast<size_t>(dims);
  return Tensor(const_cast<void*>(array.data()), dtype, Device{}, {shape.data(), count},
                {strides.data(), count});
}

}  // namespace nanoflow
