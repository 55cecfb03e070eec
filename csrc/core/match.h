#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string_view>

#include "core/tensor.h"

namespace nanoflow {

/// Checks the shapes of an op's operands against named dimensions. The first use of a name binds
/// it:
///
///   ShapeMatcher match("rms_norm");
///   match("x", x, {"T", "H"}).dtype(x.dtype());
///   match("weight", weight, {"H"});       // throws unless weight is [x.size(1)]
class ShapeMatcher {
 public:
  explicit ShapeMatcher(std::string_view op) : op_(op) {}

  class Matched {
   public:
    Matched(std::string_view op, std::string_view name, const Tensor& tensor)
        : op_(op), name_(name), tensor_(tensor) {}
    const Matched& dtype(DType expected) const;
    const Matched& contiguous_rows() const;  // the last dimension has stride 1

   private:
    std::string_view op_, name_;
    const Tensor& tensor_;
  };

  Matched operator()(std::string_view name, const Tensor& tensor,
                     std::initializer_list<std::string_view> dims);

  /// The value bound to a name.
  int64_t operator[](std::string_view dim) const;

 private:
  std::string_view op_;
  std::map<std::string_view, int64_t> bound_;
};

}  // namespace nanoflow
