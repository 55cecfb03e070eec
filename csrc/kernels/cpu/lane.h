#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "kernels/backend.h"

namespace nanoflow::cpu {

class Team;

/// One thread's view of a task that all threads of a lane run together.
class Worker {
 public:
  Worker(int index, int width, Team& team) : index_(index), width_(width), team_(team) {}
  /// The same thread in a part of the task that has its own claims, counted from zero in `claims`,
  /// and the scratch from byte `scratch_begin` on.
  Worker part(std::atomic<int64_t>& claims, size_t scratch_begin) const;

  int index() const { return index_; }  // 0 .. width() - 1
  int width() const { return width_; }
  /// Waits until every thread of the lane has come here; all must call it equally often. Throws
  /// (and the lane drops it) where another thread of the task has failed.
  void sync() const;

  struct Range {
    int64_t begin, end;
  };
  /// This thread's share of [0, count), contiguous, in multiples of `grain` but for the last.
  Range share(int64_t count, int64_t grain = 1) const;
  /// 0, 1, 2, ... in a task, each to one of its threads: work for whoever is free.
  int64_t claim() const;
  /// The memory asked for with the task: 64-byte aligned, the same for all threads, contents
  /// undefined.
  std::byte* scratch() const;

 private:
  int index_, width_;
  Team& team_;
  std::atomic<int64_t>* claims_ = nullptr;  // null: the task's own
  size_t scratch_begin_ = 0;
};

/// A lane of threads: a FIFO of tasks, each run by all of its threads at once.
class CpuLane : public Lane {
 public:
  explicit CpuLane(int width);
  ~CpuLane() override;  // runs what is queued

  /// Queues fn; every thread of the lane calls it once. The next task starts when all have
  /// returned. The scratch belongs to the lane, is reused by every task and grows when a task asks
  /// for more than before.
  void enqueue(std::function<void(const Worker&)> fn, size_t scratch_bytes = 0);
  /// Queues fn, which one thread calls between tasks, with the lane's error. It runs also when
  /// there is one; what it throws becomes the lane's error.
  void enqueue_alone(std::function<void(std::exception_ptr&)> fn);

  int width() const override;
  void wait(Event& event) override;
  void record(Event& event) override;
  void notify(std::function<void(std::exception_ptr)> fn) override;
  void stamp(int64_t* ns) override;
  void delay(std::chrono::microseconds time) override;
  void clear_error() override;

 private:
  std::unique_ptr<Team> team_;
};

/// The lane as what it is; Error for a lane of another backend.
CpuLane& cpu_lane(Lane& lane);

std::unique_ptr<Event> make_cpu_event();

}  // namespace nanoflow::cpu
