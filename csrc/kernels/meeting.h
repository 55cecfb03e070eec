#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>

namespace nanoflow {

/// A place where `size` threads wait for each other, again and again.
class Meeting {
 public:
  explicit Meeting(int size) : size_(size) {}

  /// Returns once all have come. Throws the cause of an abort, before it or while waiting.
  void wait();
  /// Frees those who wait, for good; the first cause stays and is returned.
  std::exception_ptr abort(std::exception_ptr cause);
  /// The cause of an abort, or null.
  std::exception_ptr cause() const;

 private:
  const int size_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  uint64_t meetings_ = 0;  // that have been held
  std::exception_ptr cause_;
};

}  // namespace nanoflow
