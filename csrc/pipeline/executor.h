#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "pipeline/plan.h"

namespace nanoflow {

/// Runs plans. Lanes and events are made on first use and kept; the lanes of a plan are made
/// together, so that they partition the device.
class Executor {
 public:
  /// jitter_us > 0 idles up to that long before every wait and record, to expose missing
  /// dependencies.
  Executor(Backend& backend, int jitter_us);

  /// Makes the lanes of plans with these widths now, with the memory they take.
  void make_lanes(const std::vector<int>& widths, Lane& origin) { lanes_of(widths, origin); }
  /// Enqueues the plan between what `origin` has been given and what it will be given next: all
  /// lanes fork from it and join into it; a lone lane of its width is the origin itself. `stamps`,
  /// when given, gets two times a NanoOp: begin and end in nanoseconds.
  void run(const Plan& plan, Lane& origin, int64_t* stamps = nullptr);
  /// All that have been made.
  std::vector<Lane*> lanes() const;

 private:
  void make_events(const Plan& plan);
  std::vector<Lane*> lanes_of(const std::vector<int>& widths, Lane& origin);
  void jitter(Lane& lane);

  Backend& backend_;
  int jitter_us_;
  std::minstd_rand random_;
  std::map<std::vector<int>, std::vector<std::unique_ptr<Lane>>> lanes_;  // by their widths
  std::unique_ptr<Event> forked_;
  std::vector<std::unique_ptr<Event>> joined_;    // by lane of the plan
  std::vector<std::unique_ptr<Event>> finished_;  // by OpId, null where nobody has ever waited
};

}  // namespace nanoflow
