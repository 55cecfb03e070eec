#include "core/arena.h"

#include <utility>

#include "core/error.h"

namespace nanoflow {

Buffer::Buffer(void* data, size_t bytes, Device device, Deleter deleter)
    : data_(data), bytes_(bytes), device_(device), deleter_(std::move(deleter)) {}

Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  release();
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  device_ = other.device_;
  deleter_ = std::move(other.deleter_);
  return *this;
}

Buffer::~Buffer() { release(); }

void Buffer::release() {
  if (data_ != nullptr) deleter_(data_);
  data_ = nullptr;
}

int Arena::add(std::string name, DType dtype, std::vector<int64_t> shape) {
  size_t bytes = size_of(dtype);
  for (int64_t extent : shape) {
    NF_CHECK(extent >= 0, "arena entry ", name, " has a negative dimension ", extent);
    bytes *= static_cast<size_t>(extent);
  }
  for (const Entry& entry : entries_) {
    NF_CHECK(entry.name != name, "arena entry ", name, " exists twice");
  }
  entries_.push_back({std::move(name), dtype, std::move(shape), bytes_});
  bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return static_cast<int>(entries_.size()) - 1;
}

void Arena::bind(Buffer buffer) {
  NF_CHECK(buffer.bytes() >= bytes_, "the arena needs ", bytes_, " bytes but the buffer has ",
           buffer.bytes());
  buffer_ = std::move(buffer);
}

Tensor Arena::tensor(int index) const {
  const Entry& entry = entries_.at(static_cast<size_t>(index));
  NF_CHECK(buffer_.data() != nullptr, "arena entry ", entry.name, " is used before bind()");
  void* data = buffer_.data() + entry.offset;
  const std::vector<int64_t>& s = entry.shape;
  switch (s.size()) {
    case 1:
      return Tensor(data, entry.dtype, buffer_.device(), {s[0]});
    case 2:
      return Tensor(data, entry.dtype, buffer_.device(), {s[0], s[1]});
    case 3:
      return Tensor(data, entry.dtype, buffer_.device(), {s[0], s[1], s[2]});
    case 4:
      return Tensor(data, entry.dtype, buffer_.device(), {s[0], s[1], s[2], s[3]});
    default:
      return Tensor(data, entry.dtype, buffer_.device(),
                    {s.at(0), s.at(1), s.at(2), s.at(3), s.at(4)});
  }
}

Tensor Arena::tensor(const std::string& name) const {
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].name == name) return tensor(static_cast<int>(i));
  }
  fail("the arena has no entry named ", name);
}

}  // namespace nanoflow
