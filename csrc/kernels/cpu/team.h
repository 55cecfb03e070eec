#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "core/arena.h"
#include "kernels/cpu/gate.h"
#include "kernels/cpu/lane.h"

namespace nanoflow::cpu {

/// The threads of a lane and their queue. The thread that ends a task last fetches the next one,
/// alone: whatever is not a task (waits, records, notifications) runs there and needs no barrier of
/// its own.
class Team {
 public:
  /// Throws Error where the system refuses that many threads.
  explicit Team(int width);
  ~Team();

  int width() const { return width_; }

  // Called by the lane's host thread.
  void run_together(std::function<void(const Worker&)> fn, size_t scratch_bytes);
  /// fn gets the lane's error, also when there is one, and may set or reset it.
  void run_alone(std::function<void(std::exception_ptr&)> fn);

  /// How long fn of run_alone() spins for other lanes.
  Spin& event_spin() { return event_spin_; }

  // Called by the threads of a task.
  void sync();
  int64_t claim() { return claimed_.fetch_add(1, std::memory_order_relaxed); }
  std::byte* scratch() const { return scratch_.data(); }

 private:
  struct Item;

  void push(std::unique_ptr<Item> item);
  void join_threads();
  void thread_main(int index);
  const Item* next_task();
  const Item* fetch();
  void end_task();
  void grow_scratch(size_t bytes);
  void keep_error();

  const int width_;
  std::vector<std::thread> threads_;
  Gate launched_;  // holds the threads until all exist
  bool is_launch_failed_ = false;

  // The queue: a list whose head is the item in hand and whose tail belongs to the host thread.
  std::unique_ptr<Item> head_;
  Item* tail_;
  Gate pushed_;
  Spin pushed_spin_;

  // Written by the thread that ended a task last, read by all once `started_` has advanced.
  const Item* task_ = nullptr;
  Gate started_;
  Spin started_spin_;
  std::atomic<int> ended_{0};
  std::exception_ptr error_;  // of the lane
  Spin event_spin_;
  Buffer scratch_;

  // Of the task that runs.
  std::atomic<int64_t> claimed_{0};
  std::atomic<int> at_barrier_{0};
  Gate passed_;
  Spin passed_spin_;
  std::atomic<bool> failed_{false};
  std::exception_ptr task_error_;  // of the thread that failed first
};

}  // namespace nanoflow::cpu
