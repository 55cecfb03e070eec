#include "core/match.h"

#include <sstream>

#include "core/error.h"

namespace nanoflow {

ShapeMatcher::Matched ShapeMatcher::operator()(std::string_view name, const Tensor& tensor,
                                               std::initializer_list<std::string_view> dims) {
  NF_CHECK(tensor.dims() == static_cast<int>(dims.size()), op_, ": ", name, " is ", tensor,
           " but needs ", dims.size(), " dimensions");
  int dim = 0;
  for (std::string_view symbol : dims) {
    const auto [entry, is_new] = bound_.try_emplace(symbol, tensor.size(dim));
    NF_CHECK(is_new || entry->second == tensor.size(dim), op_, ": ", name, " is ", tensor,
             " but its dimension ", dim, " (", symbol, ") must be ", entry->second);
    ++dim;
  }
  return Matched(op_, name, tensor);
}

int64_t ShapeMatcher::operator[](std::string_view dim) const {
  const auto entry = bound_.find(dim);
  NF_CHECK(entry != bound_.end(), op_, ": dimension ", dim, " is not bound");
  return entry->second;
}

const ShapeMatcher::Matched& ShapeMatcher::Matched::dtype(DType expected) const {
  NF_CHECK(tensor_.dtype() == expected, op_, ": ", name_, " is ", tensor_, " but must be ",
           expected);
  return *this;
}

const ShapeMatcher::Matched& ShapeMatcher::Matched::contiguous_rows() const {
  NF_CHECK(tensor_.stride(tensor_.dims() - 1) == 1, op_, ": ", name_,
           " must have stride 1 in its last dimension");
  return *this;
}

}  // namespace nanoflow
