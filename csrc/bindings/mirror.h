#pragma once

#include <cstddef>
#include <vector>

#include "kernels/backend.h"

namespace nanoflow {

/// Copies of host tensors in the memory of a backend. Tensors that overlap share a copy, so that
/// views of one array stay views of one.
class Mirror {
 public:
  /// Copies what the tensors span, gaps included.
  Mirror(Backend& backend, Lane& lane, const std::vector<Tensor>& tensors);

  /// The copy of one of the tensors.
  Tensor of(const Tensor& host) const;
  /// The same for a tensor that the device writes: copy_back() will bring it.
  Tensor written(const Tensor& host);
  /// Enqueues copies of what was written; the host memory holds it once the lane has come there.
  void copy_back();

 private:
  struct Region {
    std::byte *begin, *end;  // host memory
    Buffer copy;
    bool is_written = false;
  };

  size_t region_of(const Tensor& host) const;

  Backend& backend_;
  Lane& lane_;
  std::vector<Region> regions_;  // by address, disjoint
};

}  // namespace nanoflow
