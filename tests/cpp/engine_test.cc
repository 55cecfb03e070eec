#include "pipeline/engine.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "core/error.h"
#include "pipeline/executor.h"
#include "pipeline/kv_cache.h"
#include "pipeline/planner.h"
#include "pipeline/validate.h"
#include "pipeline/workspace.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

std::shared_ptr<Backend> cpu(int threads = 8) {
  return make_backend({.device = {}, .threads = threads, .isa = "auto"});
}

/// The next decode step of requests that hold `lengths` keys, tokens read from their slots.
/// Requests have room for one more token in the pages that prompt_batch gave them.
Batch decode_batch(const Batch& prompts, int step, int vocab_size) {
  Batch batch = prompts;
  batch.tokens.clear();
  batch.positions.clear();
  batch.request_indptr = {0};
  batch.sample_rows.clear();
  for (int r = 0; r < prompts.requests(); ++r) {
    batch.kv_len[r] = prompts.kv_len[r] + step;
    batch.tokens.push_back(-1 - prompts.slots[r]);
    batch.positions.push_back(batch.kv_len[r] - 1);
    batch.request_indptr.push_back(r + 1);
    batch.sample_rows.push_back(r);
    batch.counter[r] = step;
  }
  CHECK(vocab_size > 0);
  return batch;
}

}  // namespace

TEST_CASE("random valid orders on random lanes with random delays give the same bits") {
  const ModelSpec spec = tiny_spec();
  const auto backend = cpu();
  const auto weights = random_weights(spec, backend);
  const EngineConfig config = tiny_config();
  KvCache cache(spec, *backend, config.num_pages, config.page_size);
  Workspace workspace(config, spec, *backend);
  const Decoder decoder(weights, workspace.bind(cache));
  Schedule schedule = pingpong(4, 2);
  schedule.stages["qkv"].split = {0.25, 0.5};
  schedule.stages["mlp"].split = {0.5, 0.75};
  schedule.order.clear();
  const int segments = static_cast<int>(schedule.cuts().size()) + 1;
  const Batch batch = prompt_batch({5, 9, 1, 3, 7, 4}, segments, kPageSize, spec.vocab_size);
  const PlanKey key = workspace.key_of(batch, schedule.cuts());
  const std::vector<EmittedOp> program = emit_program(decoder, schedule, key);
  const std::vector<std::vector<OpId>> hazards = find_hazards(program);

  const auto run = [&](const Plan& plan, int jitter_us) {
    Executor executor(*backend, jitter_us);
    const auto origin = backend->make_lane(1);
    const auto done = backend->make_event();
    workspace.stage(batch, key, 0);
    workspace.upload(batch, 0, *origin);
    executor.run(plan, *origin);
    origin->record(*done);
    done->synchronize();
    const Tensor logits = workspace.buffers().logits.slice_rows(0, batch.samples());
    std::vector<float> values(static_cast<size_t>(logits.numel()));
    std::memcpy(values.data(), logits.bytes(), logits.span_bytes());
    std::memset(workspace.buffers().logits.bytes(), 0xff, workspace.buffers().logits.span_bytes());
    return values;
  };
  std::vector<OpId> in_order(program.size());
  std::iota(in_order.begin(), in_order.end(), 0);
  std::vector<EmittedOp> one_lane = program;
  for (EmittedOp& op : one_lane) op.lane = 0;
  const std::vector<float> expected = run(place(one_lane, in_order, {{"all", 2}}), 0);

  std::mt19937 random(11);
  for (int round = 0; round < 12; ++round) {
    std::vector<EmittedOp> shuffled = program;
    for (EmittedOp& op : shuffled) op.lane = static_cast<int>(random() % 3);
    std::vector<OpId> issue;
    std::vector<bool> issued(program.size(), false);
    while (issue.size() < program.size()) {
      std::vector<OpId> ready;
      for (OpId id = 0; id < static_cast<OpId>(program.size()); ++id) {
        const bool is_ready = !issued[id] && std::all_of(hazards[id].begin(), hazards[id].end(),
                                                         [&](OpId dep) { return issued[dep]; });
        if (is_ready) ready.push_back(id);
      }
      issue.push_back(ready[random() % ready.size()]);
      issued[issue.back()] = true;
    }
    const Plan plan = place(shuffled, issue, {{"a", 1}, {"b", 2}, {"c", 1}});
    CHECK(validate(plan, 8).empty());
    CHECK(run(plan, 200) == expected);
  }
}

TEST_CASE("steps chain through the token pool and schedules agree bit for bit") {
  const ModelSpec spec = tiny_spec();
  const auto weights = random_weights(spec, cpu());
  std::vector<std::vector<StepResult>> results;
  for (const Schedule& schedule : {sequential(2), pingpong(2, 1)}) {
    EngineConfig config = tiny_config();
    config.jitter_us = schedule.lanes.size() > 1 ? 100 : 0;
    Engine engine(config, weights, schedule);
    const int segments = static_cast<int>(schedule.cuts().size()) + 1;
    const Batch prompts = prompt_batch({5, 9, 1, 2}, segments, kPageSize, spec.vocab_size);
    std::vector<StepHandle> steps{engine.submit(prompts)};
    for (int step = 1; step <= 2; ++step) {
      steps.push_back(engine.submit(decode_batch(prompts, step, spec.vocab_size)));
      steps[step - 1].wait();
    }
    steps.back().wait();
    CHECK(engine.completed_steps() == 3);
    std::vector<StepResult> run;
    for (const StepHandle& step : steps) run.push_back(step.wait());
    results.push_back(run);
  }
  for (size_t step = 0; step < results[0].size(); ++step) {
    CHECK(results[0][step].tokens == results[1][step].tokens);
    CHECK(results[0][step].logits == results[1][step].logits);
    CHECK(results[0][step].tokens.size() == 4);
  }
}

TEST_CASE("replayed graphs give the bits of eager steps, over changing mixes of one key") {
  const ModelSpec spec = tiny_spec();
  const auto weights = random_weights(spec, cpu());
  const Batch prompts[] = {prompt_batch({5, 9, 1, 2}, 2, kPageSize, spec.vocab_size),
                           prompt_batch({7, 7, 2, 1}, 2, kPageSize, spec.vocab_size),
                           prompt_batch({6, 8, 3}, 2, kPageSize, spec.vocab_size)};
  std::vector<std::vector<float>> logits[2];
  for (const bool enforce_eager : {true, false}) {
    EngineConfig config = tiny_config();
    config.enforce_eager = enforce_eager;
    config.jitter_us = 50;
    config.row_granularity = 8;
    Engine engine(config, weights, pingpong(2, 1));
    for (int round = 0; round < 3; ++round) {
      for (const Batch& batch : prompts) {
        logits[enforce_eager].push_back(engine.submit(batch).wait().logits);
      }
    }
    const int graphs = enforce_eager ? 0 : 3;  // two of layers, one of the head
    CHECK(engine.graph_stats().count == graphs);
    Batch timed = prompts[0];
    timed.want_timings = true;
    const StepResult result = engine.submit(timed).wait();
    CHECK(result.logits == logits[enforce_eager].front());
    CHECK(result.timings.back().name == "head sample");
    CHECK(engine.graph_stats().count == graphs);
  }
  CHECK(logits[0] == logits[1]);
}

TEST_CASE("each step uploads its own pages and banned tokens") {
  const ModelSpec spec = tiny_spec(1);
  Engine engine(tiny_config(), random_weights(spec, cpu(2)), sequential(1));
  const Batch free = prompt_batch({3, 9, 5}, 1, kPageSize, spec.vocab_size);
  const std::vector<int32_t> favourites = engine.submit(free).wait().tokens;
  Batch banning = free;
  banning.banned = {favourites[0], favourites[2], 1};
  banning.banned_indptr = {0, 1, 1, 3};
  const std::vector<int32_t> others = engine.submit(banning).wait().tokens;
  CHECK(others[0] != favourites[0]);
  CHECK(others[1] == favourites[1]);
  CHECK(others[2] != favourites[2]);
  CHECK(engine.submit(prompt_batch({4}, 1, kPageSize, spec.vocab_size)).wait().tokens.size() == 1);
  CHECK(engine.submit(free).wait().tokens == favourites);
}

TEST_CASE("padding rows change nothing") {
  const ModelSpec spec = tiny_spec();
  const auto weights = random_weights(spec, cpu(2));
  std::vector<std::vector<float>> logits;
  for (int granularity : {1, 16}) {
    EngineConfig config = tiny_config();
    config.row_granularity = granularity;
    Engine engine(config, weights, pingpong(1, 1));
    logits.push_back(
        engine.submit(prompt_batch({5, 9, 1}, 2, kPageSize, spec.vocab_size)).wait().logits);
  }
  CHECK(logits[0] == logits[1]);
}

TEST_CASE("a third step in flight and bad batches are refused, the engine lives on") {
  const ModelSpec spec = tiny_spec();
  EngineConfig config = tiny_config();
  config.jitter_us = 20000;  // keeps steps in flight
  Engine engine(config, random_weights(spec, cpu(2)), pingpong(1, 1));
  const Batch good = prompt_batch({5, 9}, 2, kPageSize, spec.vocab_size);
  Batch bad = good;
  bad.tokens[0] = spec.vocab_size;
  CHECK_THROWS_AS(engine.submit(bad), Error);
  const StepHandle first = engine.submit(good), second = engine.submit(good);
  CHECK_THROWS_WITH_AS(engine.submit(good),
                       "2 steps are in flight; wait for the first before another submit()", Error);
  CHECK(first.step() == 1);
  first.wait();
  CHECK(first.is_done());
  const StepHandle third = engine.submit(good);
  CHECK(third.wait().logits == first.wait().logits);
  CHECK(second.wait().tokens == first.wait().tokens);
}

TEST_CASE("timings name every op of the plan") {
  const ModelSpec spec = tiny_spec(1);
  Engine engine(tiny_config(), random_weights(spec, cpu(2)), pingpong(1, 1));
  Batch batch = prompt_batch({5, 9}, 2, kPageSize, spec.vocab_size);
  batch.want_timings = true;
  const StepResult result = engine.submit(batch).wait();
  size_t ops = 0;
  for (const auto& plan : engine.plans(engine.schedule(), {5, 9}, 2)) ops += plan->ops.size();
  CHECK(result.timings.size() == ops);
  CHECK(result.timings.front().name == "layers.0.qkv.0 embed");
  CHECK(result.timings.back().name == "head sample");
  for (const OpTiming& timing : result.timings) {
    CHECK(timing.begin_us >= 0);
    CHECK(timing.end_us >= timing.begin_us);
  }
}

TEST_CASE("rows whose logits are not finite are marked, others are not touched") {
  const ModelSpec spec = tiny_spec(1);
  const auto weights = random_weights(spec, cpu(2));
  const Batch batch = prompt_batch({3, 3}, 1, kPageSize, spec.vocab_size);
  std::vector<float> row(static_cast<size_t>(spec.hidden_size),
                         std::numeric_limits<float>::quiet_NaN());
  const int poisoned = batch.tokens[1];
  CHECK(std::count(batch.tokens.begin() + 3, batch.tokens.end(), poisoned) == 0);
  weights->load("embed", poisoned, row.data(), row.size() * sizeof(float), DType::kF32);
  Engine engine(tiny_config(), weights, sequential(1));
  const StepResult result = engine.submit(batch).wait();
  CHECK(result.tokens[0] == Sample::kInvalidLogits);
  CHECK(result.tokens[1] >= 0);
}

TEST_CASE("incomplete weights and impossible configs are refused") {
  const ModelSpec spec = tiny_spec(1);
  const auto backend = cpu(1);
  const auto weights = std::make_shared<Weights>(spec, backend);
  std::vector<float> norm(static_cast<size_t>(spec.hidden_size), 1.0f);
  weights->load("norm", 0, norm.data(), norm.size() * sizeof(float), DType::kF32);
  CHECK_THROWS_WITH_AS(
      Engine(tiny_config(), weights, sequential(1)),
      "weights were not loaded: embed (61 of 61 rows), layers.0.input_norm (32 of 32 rows), "
      "layers.0.qkv (64 of 64 rows), layers.0.o (32 of 32 rows), layers.0.post_norm (32 of 32 "
      "rows), layers.0.gate_up (96 of 96 rows), layers.0.down (32 of 32 rows), lm_head (61 of 61 "
      "rows)",
      Error);
  const auto complete = random_weights(spec, backend);
  EngineConfig config = tiny_config();
  config.num_pages = 7;
  CHECK_THROWS_WITH_AS(Engine(config, complete, sequential(1)),
                       "the KV cache holds 28 tokens (3584 bytes), too few for one request of "
                       "max_model_len 32; lower max_model_len or raise kv_cache_memory_bytes",
                       Error);
  CHECK_THROWS_AS(Engine(tiny_config(), complete, pingpong(5, 5)), Error);  // wider than the device
}

TEST_CASE("the KV cache is made last, of as many pages as are chosen then") {
  const ModelSpec spec = tiny_spec(1);
  const auto weights = random_weights(spec, cpu(2));
  EngineConfig config = tiny_config();
  config.num_pages = 0;
  CHECK_THROWS_WITH_AS(Engine(config, weights, sequential(1)),
                       "engine config: num_pages is 0 but must be positive", Error);
  int asked = 0;
  Engine engine(config, weights, sequential(1), [&] {
    ++asked;
    return 5;
  });
  CHECK(asked == 1);
  CHECK(engine.config().num_pages == 5);
  Batch batch = prompt_batch({5, 9}, 1, kPageSize, spec.vocab_size);  // takes 5 pages
  engine.submit(batch).wait();
  batch.page_indices.back() = 5;
  CHECK_THROWS_AS(engine.submit(batch), Error);
  CHECK_THROWS_AS(Engine(config, weights, sequential(1), []() -> int { fail("none"); }), Error);
}
