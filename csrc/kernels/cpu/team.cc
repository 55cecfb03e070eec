#include "kernels/cpu/team.h"

#include <system_error>
#include <utility>

#include "core/error.h"
#include "kernels/cpu/host.h"

namespace nanoflow::cpu {
namespace {

/// Ends a thread's part of a task that has failed in another thread.
struct Abandoned {};

}  // namespace

/// A task (`together`), something one thread does between tasks (`alone`), or, with neither, the
/// end.
struct Team::Item {
  std::function<void(const Worker&)> together;
  std::function<void(std::exception_ptr&)> alone;
  size_t scratch_bytes = 0;
  std::atomic<Item*> next{nullptr};  // owned by this one
};

Team::Team(int width) : width_(width), head_(std::make_unique<Item>()), tail_(head_.get()) {
  try {
    for (int index = 0; index < width; ++index) {
      threads_.emplace_back([this, index] { thread_main(index); });
    }
  } catch (const std::system_error& error) {
    is_launch_failed_ = true;
    launched_.advance();
    join_threads();
    fail("a lane of ", width, " threads got only ", threads_.size(), ": ", error.what());
  }
  launched_.advance();
}

Team::~Team() {
  push(std::make_unique<Item>());
  join_threads();
}

void Team::join_threads() {
  for (std::thread& thread : threads_) thread.join();
}

void Team::run_together(std::function<void(const Worker&)> fn, size_t scratch_bytes) {
  auto item = std::make_unique<Item>();
  item->together = std::move(fn);
  item->scratch_bytes = scratch_bytes;
  push(std::move(item));
}

void Team::run_alone(std::function<void(std::exception_ptr&)> fn) {
  auto item = std::make_unique<Item>();
  item->alone = std::move(fn);
  push(std::move(item));
}

void Team::push(std::unique_ptr<Item> item) {
  Item* pushed = item.release();
  tail_->next.store(pushed, std::memory_order_release);
  tail_ = pushed;
  pushed_.advance();
}

void Team::thread_main(int index) {
  launched_.sleep_until_change(0);
  if (is_launch_failed_) return;
  const Worker worker(index, width_, *this);
  while (const Item* task = next_task()) {
    try {
      task->together(worker);
    } catch (const Abandoned&) {
      // the thread that failed has kept its error
    } catch (...) {
      keep_error();
    }
  }
}

const Team::Item* Team::next_task() {
  const uint32_t started = started_.value();
  if (ended_.fetch_add(1, std::memory_order_acq_rel) + 1 < width_) {
    started_.await_change(started, started_spin_);
    return task_;
  }
  ended_.store(0, std::memory_order_relaxed);
  end_task();
  task_ = fetch();
  started_.advance();
  return task_;
}

void Team::end_task() {
  if (failed_.load(std::memory_order_relaxed)) {
    if (!error_) error_ = std::move(task_error_);
    task_error_ = nullptr;
    failed_.store(false, std::memory_order_relaxed);
  }
  at_barrier_.store(0, std::memory_order_relaxed);
  claimed_.store(0, std::memory_order_relaxed);
}

const Team::Item* Team::fetch() {
  for (;;) {
    const uint32_t pushed = pushed_.value();
    std::unique_ptr<Item> next(head_->next.load(std::memory_order_acquire));
    if (!next) {
      pushed_.await_change(pushed, pushed_spin_);
      continue;
    }
    head_ = std::move(next);
    if (!head_->together && !head_->alone) return nullptr;
    try {
      if (head_->alone) {
        head_->alone(error_);
      } else if (!error_) {
        grow_scratch(head_->scratch_bytes);
        return head_.get();
      }
    } catch (...) {
      if (!error_) error_ = std::current_exception();
    }
  }
}

void Team::grow_scratch(size_t bytes) {
  if (bytes <= scratch_.bytes()) return;
  scratch_ = Buffer();  // first, so that there are never two
  scratch_ = allocate_memory(bytes);
}

void Team::keep_error() {
  if (!failed_.exchange(true, std::memory_order_acq_rel)) task_error_ = std::current_exception();
  passed_.advance();  // frees those who wait in sync()
}

void Team::sync() {
  if (width_ == 1) return;
  const uint32_t passed = passed_.value();
  if (failed_.load(std::memory_order_acquire)) throw Abandoned{};
  if (at_barrier_.fetch_add(1, std::memory_order_acq_rel) + 1 == width_) {
    at_barrier_.store(0, std::memory_order_relaxed);
    passed_.advance();
    return;
  }
  passed_.await_change(passed, passed_spin_);
  if (failed_.load(std::memory_order_acquire)) throw Abandoned{};
}

}  // namespace nanoflow::cpu
