#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <utility>

#include "kernels/backend.h"
#include "pipeline/engine.h"
#include "pipeline/plan.h"
#include "pipeline/schedule.h"

namespace nanoflow {

/// A plan as the worker keeps it.
struct CachedPlan {
  std::shared_ptr<const Schedule> schedule;
  PlanKey key;
  std::shared_ptr<const Plan> plan;
  std::unique_ptr<Graph> graph;  // once captured
  bool has_run = false;          // eagerly, so that everything it needs exists
  uint64_t last_step = 0;        // the last step that was given plan or graph
};

/// The plans used most recently, of any schedules, so that steps may switch between a few. What is
/// evicted lives on until the last step that uses it has completed. Not for several threads.
class PlanCache {
 public:
  using Build = std::function<std::shared_ptr<const Plan>(const Schedule&, const PlanKey&)>;

  PlanCache(size_t capacity, Build build);

  /// The plan of a key for step `step`, built if it is not there. The reference holds until
  /// release() is told that the step has completed.
  CachedPlan& get(const std::shared_ptr<const Schedule>& schedule, const PlanKey& key,
                  uint64_t step);
  /// Destroys what was evicted and is used by no step after `completed_steps`; tells if anything
  /// was.
  bool release(uint64_t completed_steps);
  /// Graphs alive and their memory.
  GraphStats graph_stats() const;

 private:
  size_t capacity_;
  Build build_;
  /// Plans keep their schedule alive, so its address is its name.
  using Name = std::pair<const Schedule*, PlanKey>;

  std::list<CachedPlan> plans_;  // most recently used first
  std::map<Name, std::list<CachedPlan>::iterator> index_;
  std::list<CachedPlan> evicted_;
};

}  // namespace nanoflow
