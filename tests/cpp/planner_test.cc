#include "pipeline/planner.h"

#include <doctest/doctest.h>

#include <algorithm>

#include "pipeline/executor.h"
#include "pipeline/kv_cache.h"
#include "pipeline/validate.h"
#include "pipeline/workspace.h"
#include "recording_backend.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

/// A decoder of the tiny model on a backend that computes nothing.
struct Fixture {
  explicit Fixture(int num_layers = 2) : Fixture(tiny_spec(num_layers)) {}
  explicit Fixture(const ModelSpec& spec)
      : backend(std::make_shared<RecordingBackend>()),
        weights(random_weights(spec, backend)),
        config{.max_num_batched_tokens = 64,
               .max_num_seqs = 8,
               .max_model_len = 32,
               .page_size = 4,
               .num_pages = 64},
        cache(weights->spec(), *backend, config.num_pages, config.page_size),
        workspace(config, weights->spec(), *backend),
        decoder(weights, workspace.bind(cache)) {
    backend->log.clear();
  }

  std::shared_ptr<RecordingBackend> backend;
  std::shared_ptr<Weights> weights;
  EngineConfig config;
  KvCache cache;
  Workspace workspace;
  Decoder decoder;
};

int find_op(const Plan& plan, const std::string& label) {
  for (const NanoOp& op : plan.ops) {
    if (label_of(op) == label) return op.id;
  }
  FAIL("no op ", label);
  return -1;
}

}  // namespace

TEST_CASE("the sequential plan needs no dependency") {
  Fixture f;
  const Plan plan = build_plan(f.decoder, sequential(4), {.segment_rows = {12}, .samples = 3});
  CHECK(plan.ops.size() == 2 * 8 + 1 + 4);
  for (const NanoOp& op : plan.ops) {
    CHECK(op.deps.empty());
    CHECK_FALSE(op.is_awaited);
  }
  CHECK(label_of(plan.ops[0]) == "layers.0.qkv.0 embed");
  CHECK(label_of(plan.ops.back()) == "head sample");
  CHECK(validate(plan, 8).empty());
}

TEST_CASE("ping-pong waits where data crosses lanes and nowhere else") {
  Fixture f;
  const Plan plan = build_plan(f.decoder, pingpong(4, 2), {.segment_rows = {8, 8}, .samples = 2});
  CHECK(validate(plan, 8).empty());
  const int attention = find_op(plan, "layers.1.attn.1 attention");
  CHECK(plan.ops[attention].lane == 1);
  CHECK(plan.ops[attention].deps == std::vector<OpId>{find_op(plan, "layers.1.qkv.1 rope_append")});
  const int o = find_op(plan, "layers.0.o.1 gemm");
  CHECK(plan.ops[o].deps == std::vector<OpId>{find_op(plan, "layers.0.attn.1 attention")});
  // Attention of one nano-batch is issued before the other's projections: they may run side by
  // side.
  CHECK(find_op(plan, "layers.0.attn.1 attention") < find_op(plan, "layers.0.o.0 gemm"));
  int waits = 0;
  for (const NanoOp& op : plan.ops) waits += static_cast<int>(op.deps.size());
  CHECK(waits == 2 * 2 * 2);  // layers × nano-batches × (attention after rope, o after attention)
}

TEST_CASE("experts of a nano-batch wait for nothing of another") {
  ModelSpec spec = tiny_spec(2);
  spec.num_experts = 4;
  spec.experts_per_token = 2;
  Fixture f(spec);
  const PlanKey key{.segment_rows = {8, 12}, .samples = 0};
  const std::vector<EmittedOp> program = emit_program(f.decoder, pingpong(4, 2), key);
  const std::vector<std::vector<OpId>> hazards = find_hazards(program);
  int ops = 0;
  for (size_t i = 0; i < program.size(); ++i) {
    if (program[i].label.stage != Stage::kMlp) continue;
    ++ops;
    for (OpId hazard : hazards[i]) CHECK(program[hazard].label.part == program[i].label.part);
  }
  CHECK(ops == 2 * 2 * 8);
  const Plan plan = build_plan(f.decoder, pingpong(4, 2), key);
  CHECK(validate(plan, 8).empty());
  int waits = 0;
  for (const NanoOp& op : plan.ops) waits += static_cast<int>(op.deps.size());
  CHECK(waits == 2 * 2 * 2);  // those of attention, as without experts
}

TEST_CASE("a head on a lane of the whole device is beside no other lane") {
  Fixture f;
  Schedule schedule = pingpong(6, 2);
  schedule.lanes.push_back({"all", 8});
  schedule.stages["head"].lanes = {"all"};
  const PlanKey key{.segment_rows = {8, 8}, .samples = 2};
  const Plan layers = build_plan(f.decoder, schedule, key.layers());
  CHECK(layers.lanes == std::vector<LaneSpec>{{"compute", 6}, {"memory", 2}});
  CHECK(validate(layers, 8).empty());
  const Plan head = build_plan(f.decoder, schedule, key.head());
  CHECK(head.lanes == std::vector<LaneSpec>{{"all", 8}});
  CHECK(head.ops.front().lane == 0);
  CHECK(validate(head, 8).empty());
  CHECK(validate(build_plan(f.decoder, schedule, key), 8).size() == 1);  // side by side: too wide
}

TEST_CASE("halves on lanes of their own wait for nothing of each other") {
  Fixture f;
  Schedule schedule = pingpong(4, 4);
  for (const char* stage : {"qkv", "attn", "o", "mlp"}) {
    schedule.stages[stage].lanes = {"compute", "memory"};
  }
  const Plan plan = build_plan(f.decoder, schedule, {.segment_rows = {8, 8}, .samples = 0});
  CHECK(validate(plan, 8).empty());
  for (const NanoOp& op : plan.ops) {
    CHECK(op.lane == op.label.part);
    CHECK(op.deps.empty());
  }
}

TEST_CASE("parts in turn wait for each other and for nothing else") {
  Fixture f;
  Schedule schedule = pingpong(4, 4);
  for (const char* stage : {"qkv", "attn", "o", "mlp"}) {
    schedule.stages[stage].lanes = {"compute", "memory"};
  }
  schedule.stages["attn"].in_turn = true;
  const Plan plan = build_plan(f.decoder, schedule, {.segment_rows = {8, 8}, .samples = 0});
  CHECK(validate(plan, 8).empty());
  OpId before = -1;
  for (const NanoOp& op : plan.ops) {
    if (op.label.stage != Stage::kAttention) {
      CHECK(op.deps.empty());
      continue;
    }
    CHECK(op.deps == (before < 0 ? std::vector<OpId>{} : std::vector<OpId>{before}));
    before = op.id;
  }
  CHECK(before >= 0);
}

TEST_CASE("a stage cut finer than its neighbour waits for all parts it covers") {
  Fixture f;
  Schedule schedule = pingpong(4, 2);
  schedule.stages["qkv"].split = {0.25, 0.5, 0.75};
  schedule.order = {"o.0", "mlp.0", "qkv.0@+1", "qkv.1@+1", "o.1", "mlp.1", "qkv.3@+1", "qkv.2@+1"};
  const Plan plan = build_plan(f.decoder, schedule, {.segment_rows = {4, 4, 4, 4}, .samples = 2});
  CHECK(validate(plan, 8).empty());
  const int attention = find_op(plan, "layers.1.attn.1 attention");
  CHECK(plan.ops[attention].deps ==
        std::vector<OpId>{find_op(plan, "layers.1.qkv.2 rope_append")});  // issued after part 3
}

TEST_CASE("parts without rows and steps without samples are left out") {
  Fixture f;
  const Plan plan = build_plan(f.decoder, pingpong(4, 2), {.segment_rows = {0, 8}, .samples = 0});
  CHECK(validate(plan, 8).empty());
  for (const NanoOp& op : plan.ops) {
    CHECK(op.label.part == 1);
    CHECK(op.label.stage != Stage::kHead);
  }
}

TEST_CASE("the head does what its options say, before or after it samples") {
  Fixture f;
  const auto head_of = [&](const HeadOptions& options) {
    const PlanKey key{.segment_rows = {}, .samples = 4, .options = options};
    const Plan plan = build_plan(f.decoder, sequential(4), key);
    CHECK(validate(plan, 8).empty());
    std::string names;
    for (const NanoOp& op : plan.ops) names += std::string(name_of(op.op)) + " ";
    return names;
  };
  const std::string logits = "gather_rows rms_norm gemm ";
  CHECK(head_of({}) == logits + "sample ");
  CHECK(head_of({.penalties = true}) == logits + "penalize sample record_samples ");
  CHECK(head_of({.bias = true, .penalties = true, .masks = true}) ==
        logits + "add_bias penalize mask_logits sample record_samples ");
  CHECK(head_of({.logprobs = true}) == logits + "sample logprobs ");
  CHECK(head_of({.penalties = true, .logprobs = true, .logits_again = true}) ==
        logits + "penalize sample record_samples gemm logprobs ");
}

TEST_CASE("a step's layers and its head are two plans that make up the whole") {
  Fixture f;
  const PlanKey key{.segment_rows = {8, 8}, .samples = 4};
  const Plan whole = build_plan(f.decoder, pingpong(4, 2), key);
  const Plan layers = build_plan(f.decoder, pingpong(4, 2), key.layers());
  const Plan head = build_plan(f.decoder, pingpong(4, 2), key.head());
  CHECK(layers.key == PlanKey{.segment_rows = {8, 8}, .samples = 0});
  CHECK(head.key == PlanKey{.segment_rows = {}, .samples = 4});
  CHECK(validate(layers, 8).empty());
  CHECK(validate(head, 8).empty());
  CHECK(layers.ops.size() + head.ops.size() == whole.ops.size());
  for (const NanoOp& op : whole.ops) {
    const bool is_head = op.label.stage == Stage::kHead;
    const NanoOp& own = is_head ? head.ops[op.id - layers.ops.size()] : layers.ops[op.id];
    CHECK(label_of(own) == label_of(op));
    CHECK(own.lane == op.lane);
  }
  for (const NanoOp& op : head.ops) CHECK(op.deps.empty());
}

TEST_CASE("an order that runs an op before its input is refused") {
  Fixture f;
  Schedule schedule = pingpong(4, 2);
  schedule.order = {"qkv.0", "qkv.1", "o.0", "o.1", "mlp.0", "mlp.1", "attn.0", "attn.1"};
  CHECK_THROWS_WITH_AS(
      build_plan(f.decoder, schedule, {.segment_rows = {8, 8}, .samples = 2}),
      "layers.0.o.0 gemm is issued before attention of layer 0 (stage attn), on which it depends",
      Error);
  CHECK_THROWS_AS(build_plan(f.decoder, pingpong(4, 2), {.segment_rows = {8}, .samples = 2}),
                  Error);
}

TEST_CASE("validate finds a planted missing dependency") {
  Fixture f;
  const Plan sound = build_plan(f.decoder, pingpong(4, 2), {.segment_rows = {8, 8}, .samples = 2});
  int planted = 0;
  for (const NanoOp& op : sound.ops) {
    if (op.deps.empty()) continue;
    Plan broken = sound;
    broken.ops[op.id].deps.clear();
    const std::vector<std::string> findings = validate(broken, 8);
    CHECK_MESSAGE(!findings.empty(), label_of(op));
    ++planted;
  }
  CHECK(planted == 8);
  Plan broken = sound;
  broken.ops[find_op(sound, "layers.0.o.0 gemm")].deps.clear();
  const std::vector<std::string> findings = validate(broken, 8);
  const auto names = [&](const std::string& text) {
    return std::any_of(findings.begin(), findings.end(), [&](const std::string& finding) {
      return finding.find(text) != std::string::npos;
    });
  };
  CHECK(names("layers.0.attn.0 attention"));
  CHECK(names("layers.0.o.0 gemm"));
}

TEST_CASE("validate finds what is structurally wrong") {
  Fixture f;
  const Plan sound = build_plan(f.decoder, pingpong(4, 2), {.segment_rows = {8, 8}, .samples = 2});
  CHECK(validate(sound, 5) ==
        std::vector<std::string>{"lane widths add up to 6 but the device has 5"});
  Plan broken = sound;
  const int o = find_op(sound, "layers.0.o.0 gemm");
  broken.ops[o].deps = {o + 1};
  CHECK(validate(broken, 8).size() == 1);
  broken = sound;
  broken.ops[sound.ops[o].deps[0]].is_awaited = false;
  CHECK(validate(broken, 8).size() == 1);
  broken = sound;
  broken.ops[3].lane = 7;
  CHECK(validate(broken, 8).size() == 1);
}

TEST_CASE("the executor forks, waits, records and joins in exactly this order") {
  Fixture f(1);
  const Plan plan = build_plan(f.decoder, pingpong(4, 2), {.segment_rows = {8, 8}, .samples = 2});
  Executor executor(*f.backend, 0);
  const auto origin = f.backend->make_lane(8);
  f.backend->log.clear();
  executor.run(plan, *origin);
  const std::vector<std::string>& log = f.backend->log;
  const std::string o = log.front().substr(0, log.front().find(':'));
  const std::string c = log[1].substr(0, log[1].find(':')), m = log[2].substr(0, log[2].find(':'));
  const auto event = [&](size_t line) { return log[line].substr(log[line].rfind(' ')); };
  const std::string fork = event(0), rope0 = event(7), attn0 = event(10);
  const std::string rope1 = event(15), attn1 = event(18);
  const std::string join_c = event(33), join_m = event(35);
  const std::vector<std::string> qkv0{c + ": embed", c + ": rms_norm", c + ": gemm",
                                      c + ": rope_append"};
  const std::vector<std::string> mlp{c + ": gemm", c + ": rms_norm", c + ": gemm_silu_mul",
                                     c + ": gemm"};
  std::vector<std::string> expected{o + ": record" + fork, c + ": wait" + fork,
                                    m + ": wait" + fork};
  const auto add = [&](const std::vector<std::string>& lines) {
    expected.insert(expected.end(), lines.begin(), lines.end());
  };
  add(qkv0);
  add({c + ": record" + rope0, m + ": wait" + rope0, m + ": attention", m + ": record" + attn0});
  add(qkv0);
  add({c + ": record" + rope1, m + ": wait" + rope1, m + ": attention", m + ": record" + attn1});
  add({c + ": wait" + attn0});
  add(mlp);
  add({c + ": wait" + attn1});
  add(mlp);
  add({c + ": gather_rows", c + ": rms_norm", c + ": gemm", c + ": sample"});
  add({c + ": record" + join_c, o + ": wait" + join_c, m + ": record" + join_m,
       o + ": wait" + join_m});
  CHECK(log == expected);
  REQUIRE(f.backend->ranges.size() == plan.ops.size());
  for (const NanoOp& op : plan.ops) CHECK(f.backend->ranges[op.id] == label_of(op));
}

TEST_CASE("a plan of one lane as wide as the origin runs on the origin") {
  Fixture f(1);
  const Plan plan = build_plan(f.decoder, sequential(8), {.segment_rows = {8}, .samples = 2});
  Executor executor(*f.backend, 0);
  const auto origin = f.backend->make_lane(8);
  f.backend->log.clear();
  executor.run(plan, *origin);
  const std::string lane = f.backend->log.front().substr(0, f.backend->log.front().find(':'));
  std::vector<std::string> expected;
  for (const NanoOp& op : plan.ops) expected.push_back(lane + ": " + std::string(name_of(op.op)));
  CHECK(f.backend->log == expected);
  f.backend->log.clear();
  origin->wait(*f.backend->make_event());
  CHECK(f.backend->log.front().starts_with(lane + ": "));
}
