#include "kernels/meeting.h"

#include <utility>

namespace nanoflow {

void Meeting::wait() {
  std::unique_lock lock(mutex_);
  if (cause_ != nullptr) std::rethrow_exception(cause_);
  if (++waiting_ == size_) {
    waiting_ = 0;
    ++meetings_;
    changed_.notify_all();
    return;
  }
  changed_.wait(lock, [&, held = meetings_] { return meetings_ != held || cause_ != nullptr; });
  if (cause_ != nullptr) std::rethrow_exception(cause_);
}

std::exception_ptr Meeting::abort(std::exception_ptr cause) {
  const std::lock_guard lock(mutex_);
  if (cause_ == nullptr) cause_ = std::move(cause);
  changed_.notify_all();
  return cause_;
}

std::exception_ptr Meeting::cause() const {
  const std::lock_guard lock(mutex_);
  return cause_;
}

}  // namespace nanoflow
