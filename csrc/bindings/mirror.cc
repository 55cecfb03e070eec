#include "bindings/mirror.h"

#include <algorithm>
#include <array>

#include "core/error.h"

namespace nanoflow {
namespace {

/// One past the last byte; a tensor without elements still has an address.
std::byte* end_of(const Tensor& tensor) {
  return tensor.bytes() + std::max<size_t>(1, tensor.span_bytes());
}

}  // namespace

Mirror::Mirror(Backend& backend, Lane& lane, const std::vector<Tensor>& tensors)
    : backend_(backend), lane_(lane) {
  std::vector<Tensor> sorted = tensors;
  std::sort(sorted.begin(), sorted.end(),
            [](const Tensor& a, const Tensor& b) { return a.bytes() < b.bytes(); });
  for (const Tensor& tensor : sorted) {
    if (!regions_.empty() && tensor.bytes() < regions_.back().end) {
      regions_.back().end = std::max(regions_.back().end, end_of(tensor));
    } else {
      regions_.push_back({.begin = tensor.bytes(), .end = end_of(tensor), .copy = Buffer()});
    }
  }
  for (Region& region : regions_) {
    const auto bytes = static_cast<size_t>(region.end - region.begin);
    region.copy = backend_.allocate(bytes);
    backend_.copy(region.copy.data(), region.begin, bytes, lane_);
  }
}

size_t Mirror::region_of(const Tensor& host) const {
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (regions_[i].begin <= host.bytes() && host.bytes() < regions_[i].end) return i;
  }
  fail("a tensor was not mirrored");
}

Tensor Mirror::of(const Tensor& host) const {
  const Region& region = regions_[region_of(host)];
  std::array<int64_t, Tensor::kMaxDims> shape{}, strides{};
  for (int dim = 0; dim < host.dims(); ++dim) {
    shape[dim] = host.size(dim);
    strides[dim] = host.stride(dim);
  }
  const auto dims = static_cast<size_t>(host.dims());
  return Tensor(region.copy.data() + (host.bytes() - region.begin), host.dtype(), backend_.device(),
                {shape.data(), dims}, {strides.data(), dims});
}

Tensor Mirror::written(const Tensor& host) {
  regions_[region_of(host)].is_written = true;
  return of(host);
}

void Mirror::copy_back() {
  for (const Region& region : regions_) {
    if (!region.is_written) continue;
    backend_.copy(region.begin, region.copy.data(), static_cast<size_t>(region.end - region.begin),
                  lane_);
  }
}

}  // namespace nanoflow
