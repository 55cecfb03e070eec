#include <doctest/doctest.h>

#include <algorithm>

#include "away_backend.h"
#include "core/error.h"
#include "pipeline/engine.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

std::shared_ptr<Backend> cpu() { return make_backend({.device = {}, .threads = 2, .isa = "auto"}); }

std::vector<float> values_of(const Tensor& tensor) {
  const auto* begin = tensor.data<float>();
  return {begin, begin + tensor.numel()};
}

}  // namespace

TEST_CASE("an engine that has slept gives what it gave before") {
  const ModelSpec spec = tiny_spec();
  const auto weights = random_weights(spec, cpu());
  Engine engine(tiny_config(), weights, pingpong(1, 1));
  const Batch batch = prompt_batch({5, 9}, 2, kPageSize, spec.vocab_size);
  const std::vector<float> expected = engine.submit(batch).wait().logits;
  engine.sleep(false);
  CHECK(engine.is_asleep());
  CHECK_THROWS_WITH_AS(engine.submit(batch), "the engine is asleep; wake it up first", Error);
  CHECK(engine.completed_steps() == 1);
  CHECK(engine.config().num_pages == 64);
  engine.wake_weights();
  engine.wake_cache();
  const StepHandle next = engine.submit(batch);
  CHECK(next.step() == 2);
  CHECK(next.wait().logits == expected);
  CHECK(engine.completed_steps() == 2);
}

TEST_CASE("discarded weights have to be filled again") {
  const ModelSpec spec = tiny_spec();
  const auto weights = random_weights(spec, cpu());
  Engine engine(tiny_config(), weights, pingpong(1, 1));
  engine.sleep(true);
  engine.wake_weights();
  CHECK_THROWS_AS(engine.wake_cache(), Error);
  CHECK(engine.is_asleep());
}

TEST_CASE("an engine does not sleep while a step is in flight, nor with a host pool") {
  const ModelSpec spec = tiny_spec();
  EngineConfig config = tiny_config();
  config.jitter_us = 20000;  // keeps steps in flight
  config.host_slots = 4;
  Engine engine(config, random_weights(spec, cpu()), pingpong(1, 1));
  const StepHandle step = engine.submit(prompt_batch({5, 9}, 2, kPageSize, spec.vocab_size));
  CHECK_THROWS_WITH_AS(engine.sleep(false), "1 steps are in flight; wait for them before sleep()",
                       Error);
  step.wait();
  CHECK_THROWS_WITH_AS(engine.sleep(false), "an engine with a host pool of 4 slots cannot sleep",
                       Error);
  CHECK(!engine.is_asleep());
}

TEST_CASE("weights of a device are kept on the host, and come back") {
  const auto weights = random_weights(tiny_spec(), std::make_shared<AwayBackend>());
  weights->finish();
  std::vector<std::vector<float>> expected;
  for (size_t i = 0; i < weights->entries().size(); ++i) {
    expected.push_back(values_of(weights->tensor(static_cast<int>(i))));
  }
  CHECK(std::ranges::any_of(expected.front(), [](float value) { return value != 0; }));
  weights->sleep(false);
  CHECK_THROWS_AS(weights->embed(), Error);
  weights->wake_up();
  weights->finish();
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(values_of(weights->tensor(static_cast<int>(i))) == expected[i]);
  }
}
