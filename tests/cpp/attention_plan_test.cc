#include <doctest/doctest.h>

#include <map>
#include <set>

#include "pipeline/kv_cache.h"
#include "pipeline/planner.h"
#include "pipeline/validate.h"
#include "pipeline/workspace.h"
#include "recording_backend.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

/// A backend whose attention reads a work list.
class PlanningBackend : public RecordingBackend {
 public:
  size_t attention_work_bytes(int requests, int rows, int num_heads,
                              int num_kv_heads) const override {
    asked = {requests, rows, num_heads, num_kv_heads};
    return 1000;
  }
  mutable std::vector<int> asked;
};

Plan plan_on(const std::shared_ptr<RecordingBackend>& backend, const Schedule& schedule,
             const std::vector<int>& segment_rows, const std::vector<int>& layer_windows = {}) {
  ModelSpec spec = tiny_spec();
  spec.layer_windows = layer_windows;
  const auto weights = random_weights(spec, backend);
  const EngineConfig config{.max_num_batched_tokens = 64,
                            .max_num_seqs = 8,
                            .max_model_len = 32,
                            .page_size = 4,
                            .num_pages = 64};
  const KvCache cache(weights->spec(), *backend, config.num_pages, config.page_size);
  Workspace workspace(config, weights->spec(), *backend);
  const Decoder decoder(weights, workspace.bind(cache));
  return build_plan(decoder, schedule, {.segment_rows = segment_rows, .samples = 1});
}

}  // namespace

TEST_CASE("each attention nano-batch is planned once, before its first layer, on its lane") {
  const auto backend = std::make_shared<PlanningBackend>();
  const Plan plan = plan_on(backend, pingpong(4, 4), {12, 8});
  CHECK(backend->asked == std::vector<int>{8, 64 + Workspace::kMaxSegments, 4, 2});
  CHECK(validate(plan, 8).empty());
  std::map<int, const PlanAttention*> planned;  // by part
  std::set<std::byte*> buffers;
  int attentions = 0;
  for (const NanoOp& op : plan.ops) {
    if (const auto* made = std::get_if<PlanAttention>(&op.op)) {
      CHECK(op.label.layer == 0);
      CHECK(op.lane == 1);
      CHECK(planned.emplace(op.label.part, made).second);
      CHECK(buffers.insert(made->work.bytes()).second);
      CHECK(made->work.span_bytes() == 1000);
    }
    if (const auto* attention = std::get_if<Attention>(&op.op)) {
      ++attentions;
      REQUIRE(planned.contains(op.label.part));  // comes earlier on the same lane
      const PlanAttention& list = *planned[op.label.part];
      CHECK(attention->work.bytes() == list.work.bytes());
      CHECK(attention->segment_begin == list.segment_begin);
      CHECK(attention->segment_end == list.segment_end);
    }
  }
  CHECK(planned.size() == 2);
  CHECK(attentions == 2 * 3);
}

TEST_CASE("each window of a model is planned once, before the first layer that has it") {
  const auto backend = std::make_shared<PlanningBackend>();
  const Plan plan = plan_on(backend, sequential(4), {12}, {0, 6, 0});
  CHECK(validate(plan, 8).empty());
  std::map<int, std::byte*> planned;  // by window
  std::vector<int> layers;
  for (const NanoOp& op : plan.ops) {
    if (const auto* made = std::get_if<PlanAttention>(&op.op)) {
      layers.push_back(op.label.layer);
      CHECK(planned.emplace(made->window, made->work.bytes()).second);
    }
    if (const auto* attention = std::get_if<Attention>(&op.op)) {
      CHECK(attention->window == (op.label.layer == 1 ? 6 : 0));
      CHECK(attention->work.bytes() == planned.at(attention->window));
    }
  }
  CHECK(layers == std::vector<int>{0, 1});
  CHECK(planned[0] != planned[6]);
}

TEST_CASE("a backend that asks for no work list gets none") {
  const Plan plan = plan_on(std::make_shared<RecordingBackend>(), sequential(4), {12});
  for (const NanoOp& op : plan.ops) {
    CHECK_FALSE(std::holds_alternative<PlanAttention>(op.op));
    if (const auto* attention = std::get_if<Attention>(&op.op)) CHECK_FALSE(attention->work);
  }
}
