#pragma once

#include <functional>
#include <memory>

#include "kernels/backend.h"

namespace nanoflow::cpu {

class Team;

/// One thread's view of a task that all threads of a lane run together.
class Worker {
 public:
  Worker(int index, int width, Team& team) : index_(index), width_(width), team_(team) {}

  int index() const { return index_; }  // 0 .. width() - 1
  int width() const { return width_; }
  /// Waits until every thread of the lane has come here; all must call it equally often.
  void sync() const;

  struct Range {
    int64_t begin, end;
  };
  /// This thread's share of [0, count), contiguous, in multiples of `grain` but for the last.
  Range share(int64_t count, int64_t grain = 1) const;

 private:
  int index_, width_;
  Team& team_;
};

/// A lane of threads: a FIFO of tasks, each run by all of its threads at once.
class CpuLane : public Lane {
 public:
  explicit CpuLane(int width);
  ~CpuLane() override;

  /// Queues fn; every thread of the lane calls it once. The next task starts when all have returned.
  void enqueue(std::function<void(const Worker&)> fn);

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

}  // namespace nanoflow::cpu
