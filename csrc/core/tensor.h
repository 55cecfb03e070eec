#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <span>

#include "core/device.h"
#include "core/dtype.h"

namespace nanoflow {

/// A view of memory somebody else owns: trivially copyable, held by value in every op. Strides are
/// in elements. An empty view (no data) stands for an optional operand that is absent.
class Tensor {
 public:
  static constexpr int kMaxDims = 5;

  Tensor() = default;
  /// A contiguous view.
  Tensor(void* data, DType dtype, Device device, std::initializer_list<int64_t> shape);
  /// A view with any strides, as many as there are dimensions.
  Tensor(void* data, DType dtype, Device device, std::span<const int64_t> shape,
         std::span<const int64_t> strides);

  explicit operator bool() const { return data_ != nullptr; }
  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  std::byte* bytes() const { return static_cast<std::byte*>(data_); }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  int dims() const { return dims_; }
  int64_t size(int dim) const { return shape_[dim]; }
  int64_t stride(int dim) const { return strides_[dim]; }
  int64_t numel() const;
  bool is_contiguous() const;

  /// Rows [begin, end) of the first dimension; free.
  Tensor slice_rows(int64_t begin, int64_t end) const;
  /// Columns [begin, end) of the last dimension; free, and strided.
  Tensor slice_columns(int64_t begin, int64_t end) const;
  /// The index-th element along `dim`, one dimension less; free.
  Tensor select(int dim, int64_t index) const;
  /// Bytes from the first to one past the last element, gaps included.
  size_t span_bytes() const;

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  Device device_;
  int dims_ = 0;
  std::array<int64_t, kMaxDims> shape_{};
  std::array<int64_t, kMaxDims> strides_{};
};

/// Prints dtype and shape, as in "bfloat16[128, 576]".
std::ostream& operator<<(std::ostream& out, const Tensor& tensor);

}  // namespace nanoflow
