#include "pipeline/plan_cache.h"

#include <iterator>
#include <utility>

namespace nanoflow {

PlanCache::PlanCache(size_t capacity, Build build)
    : capacity_(capacity), build_(std::move(build)) {}

CachedPlan& PlanCache::get(const std::shared_ptr<const Schedule>& schedule, const PlanKey& key,
                           uint64_t step) {
  const Name name{schedule.get(), key};
  if (const auto entry = index_.find(name); entry != index_.end()) {
    plans_.splice(plans_.begin(), plans_, entry->second);
  } else {
    plans_.push_front(
        {.schedule = schedule, .key = key, .plan = build_(*schedule, key), .graph = nullptr});
    index_[name] = plans_.begin();
    if (plans_.size() > capacity_) {
      index_.erase({plans_.back().schedule.get(), plans_.back().key});
      evicted_.splice(evicted_.end(), plans_, std::prev(plans_.end()));
    }
  }
  plans_.front().last_step = step;
  return plans_.front();
}

bool PlanCache::release(uint64_t completed_steps) {
  return std::erase_if(evicted_, [&](const CachedPlan& cached) {
           return cached.last_step <= completed_steps;
         }) > 0;
}

GraphStats PlanCache::graph_stats() const {
  GraphStats stats;
  for (const std::list<CachedPlan>* plans : {&plans_, &evicted_}) {
    for (const CachedPlan& cached : *plans) {
      if (cached.graph == nullptr) continue;
      ++stats.count;
      stats.bytes += cached.graph->bytes();
    }
  }
  return stats;
}

}  // namespace nanoflow
