#include "core/tensor.h"

#include <algorithm>

#include "core/error.h"

namespace nanoflow {

Tensor::Tensor(void* data, DType dtype, Device device, std::initializer_list<int64_t> shape)
    : data_(data), dtype_(dtype), device_(device), dims_(static_cast<int>(shape.size())) {
  NF_CHECK(shape.size() >= 1 && shape.size() <= kMaxDims, "a tensor has 1 to ", kMaxDims,
           " dimensions, not ", shape.size());
  int dim = 0;
  for (int64_t extent : shape) shape_[dim++] = extent;
  int64_t stride = 1;
  for (dim = dims_ - 1; dim >= 0; --dim) {
    strides_[dim] = stride;
    stride *= shape_[dim];
  }
}

Tensor::Tensor(void* data, DType dtype, Device device, std::span<const int64_t> shape,
               std::span<const int64_t> strides)
    : data_(data), dtype_(dtype), device_(device), dims_(static_cast<int>(shape.size())) {
  NF_CHECK(shape.size() >= 1 && shape.size() <= kMaxDims && strides.size() == shape.size(),
           "a tensor has 1 to ", kMaxDims, " dimensions, each with a stride, not ", shape.size(),
           " with ", strides.size());
  std::ranges::copy(shape, shape_.begin());
  std::ranges::copy(strides, strides_.begin());
}

int64_t Tensor::numel() const {
  int64_t count = dims_ == 0 ? 0 : 1;
  for (int dim = 0; dim < dims_; ++dim) count *= shape_[dim];
  return count;
}

bool Tensor::is_contiguous() const {
  int64_t stride = 1;
  for (int dim = dims_ - 1; dim >= 0; --dim) {
    if (shape_[dim] != 1 && strides_[dim] != stride) return false;
    stride *= shape_[dim];
  }
  return true;
}

Tensor Tensor::slice_rows(int64_t begin, int64_t end) const {
  NF_CHECK(dims_ >= 1 && 0 <= begin && begin <= end && end <= shape_[0], "rows [", begin, ", ", end,
           ") are outside ", *this);
  Tensor view = *this;
  view.data_ = bytes() + begin * strides_[0] * static_cast<int64_t>(size_of(dtype_));
  view.shape_[0] = end - begin;
  return view;
}

Tensor Tensor::slice_columns(int64_t begin, int64_t end) const {
  const int last = dims_ - 1;
  NF_CHECK(dims_ >= 1 && 0 <= begin && begin <= end && end <= shape_[last], "columns [", begin,
           ", ", end, ") are outside ", *this);
  Tensor view = *this;
  view.data_ = bytes() + begin * strides_[last] * static_cast<int64_t>(size_of(dtype_));
  view.shape_[last] = end - begin;
  return view;
}

Tensor Tensor::select(int dim, int64_t index) const {
  NF_CHECK(dims_ >= 2 && 0 <= dim && dim < dims_ && 0 <= index && index < shape_[dim], "index ",
           index, " of dimension ", dim, " is outside ", *this);
  Tensor view = *this;
  view.data_ = bytes() + index * strides_[dim] * static_cast<int64_t>(size_of(dtype_));
  view.dims_ = dims_ - 1;
  for (int d = dim; d < view.dims_; ++d) {
    view.shape_[d] = shape_[d + 1];
    view.strides_[d] = strides_[d + 1];
  }
  return view;
}

size_t Tensor::span_bytes() const {
  if (numel() == 0) return 0;
  int64_t last = 0;
  for (int dim = 0; dim < dims_; ++dim) last += (shape_[dim] - 1) * strides_[dim];
  return static_cast<size_t>(last + 1) * size_of(dtype_);
}

std::ostream& operator<<(std::ostream& out, const Tensor& tensor) {
  out << tensor.dtype() << "[";
  for (int dim = 0; dim < tensor.dims(); ++dim) out << (dim ? ", " : "") << tensor.size(dim);
  return out << "]";
}

}  // namespace nanoflow
