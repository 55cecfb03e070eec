#pragma once

#include <cstddef>
#include <cstdint>

namespace nanoflow::cpu {
namespace {  // as files that are compiled for different instruction sets use it

/// Hands out 64-byte aligned pieces of a scratch; with no memory behind it, it only counts bytes.
class ScratchPieces {
 public:
  explicit ScratchPieces(std::byte* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    std::byte* piece = base_ + bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  size_t bytes_ = 0;
};

}  // namespace
}  // namespace nanoflow::cpu
