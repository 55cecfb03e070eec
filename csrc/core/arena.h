#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace nanoflow {

/// Owns bytes of one device; move-only. The backend that made it supplies the deleter.
class Buffer {
 public:
  using Deleter = std::function<void(void*)>;

  Buffer() = default;
  Buffer(void* data, size_t bytes, Device device, Deleter deleter);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t bytes() const { return bytes_; }
  Device device() const { return device_; }

 private:
  void release();

  void* data_ = nullptr;
  size_t bytes_ = 0;
  Device device_;
  Deleter deleter_;
};

/// Named, aligned carve-outs of one Buffer. Describe first, then bind: addresses never change
/// afterwards.
class Arena {
 public:
  struct Entry {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
    size_t offset;  // bytes from the start of the buffer
  };
  static constexpr size_t kAlignment = 256;

  /// Reserves room for a tensor; returns its index. Names are unique.
  int add(std::string name, DType dtype, std::vector<int64_t> shape);
  /// Bytes the entries need.
  size_t bytes() const { return bytes_; }
  /// Takes the memory; it must hold bytes().
  void bind(Buffer buffer);
  /// Gives the memory back to the caller; the arena is to be bound again.
  Buffer unbind() { return std::move(buffer_); }
  std::byte* data() const { return buffer_.data(); }
  Tensor tensor(int index) const;
  Tensor tensor(const std::string& name) const;
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::vector<Entry> entries_;
  size_t bytes_ = 0;
  Buffer buffer_;
};

}  // namespace nanoflow
