#include "pipeline/plan_cache.h"

#include <doctest/doctest.h>

#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

struct CountedGraph : Graph {
  explicit CountedGraph(int& alive) : alive(alive) { ++alive; }
  ~CountedGraph() override { --alive; }
  void launch(Lane&) override {}
  size_t bytes() const override { return 100; }
  int& alive;
};

PlanKey key_of(int samples) { return {.segment_rows = {}, .samples = samples}; }

}  // namespace

TEST_CASE("the plan used longest ago leaves, and its graph when no step uses it") {
  int built = 0, alive = 0;
  PlanCache cache(2, [&](const Schedule& schedule, const PlanKey& key) {
    ++built;
    return std::make_shared<Plan>(
        Plan{.schedule_id = schedule.id, .key = key, .lanes = schedule.lanes, .ops = {}});
  });
  const auto schedule = std::make_shared<Schedule>(sequential(2));
  const auto get = [&](int samples, uint64_t step) -> CachedPlan& {
    CachedPlan& cached = cache.get(schedule, key_of(samples), step);
    CHECK(cached.plan->key == key_of(samples));
    if (cached.graph == nullptr) cached.graph = std::make_unique<CountedGraph>(alive);
    return cached;
  };
  const CachedPlan& first = get(1, 1);
  get(2, 1);
  CHECK(&get(1, 2) == &first);
  get(3, 3);  // 2 leaves
  CHECK(built == 3);
  CHECK_FALSE(cache.release(0));
  CHECK(alive == 3);
  CHECK(cache.graph_stats().count == 3);
  CHECK(cache.graph_stats().bytes == 300);
  CHECK(cache.release(1));
  CHECK(alive == 2);
  CHECK(&get(1, 4) == &first);
  get(2, 5);  // 3 leaves
  CHECK(built == 4);
  CHECK_FALSE(cache.release(2));
  CHECK(cache.release(3));

  const auto other = std::make_shared<Schedule>(sequential(1));
  cache.get(other, key_of(1), 6);  // 1 of the first schedule leaves
  CHECK(built == 5);
  get(2, 7);  // the schedules take turns
  cache.get(other, key_of(1), 8);
  CHECK(built == 5);
  CHECK(cache.release(5));
  CHECK(alive == 1);
  CHECK(cache.graph_stats().count == 1);
}
