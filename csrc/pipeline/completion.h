#pragma once

#include <condition_variable>
#include <exception>
#include <mutex>
#include <utility>

namespace nanoflow {

/// Tells any thread when something asynchronous has ended, and how.
class Completion {
 public:
  void finish(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    error_ = std::move(error);
    done_ = true;
    changed_.notify_all();
  }
  bool is_done() const {
    const std::lock_guard lock(mutex_);
    return done_;
  }
  /// Rethrows the error.
  void wait() const {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool done_ = false;
  std::exception_ptr error_;
};

}  // namespace nanoflow
