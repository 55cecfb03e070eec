#pragma once

#include <condition_variable>
#include <exception>
#include <mutex>
#include <utility>

namespace nanoflow {

/// Tells any thread when something asynchronous has ended, and how: all of its parts.
class Completion {
 public:
  explicit Completion(int parts = 1) : unfinished_(parts) {}

  /// Called once a part; the first error stays.
  void finish(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (error_ == nullptr) error_ = std::move(error);
    if (--unfinished_ == 0) changed_.notify_all();
  }
  bool is_done() const {
    const std::lock_guard lock(mutex_);
    return unfinished_ == 0;
  }
  /// Rethrows the error.
  void wait() const {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return unfinished_ == 0; });
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  int unfinished_;
  std::exception_ptr error_;
};

}  // namespace nanoflow
