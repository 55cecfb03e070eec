#include <doctest/doctest.h>

#include "core/error.h"
#include "failing_backend.h"
#include "pipeline/engine.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

TEST_CASE("a step that fails on the device fails alone once the engine has been restarted") {
  const ModelSpec spec = tiny_spec();
  for (const bool has_host_pool : {false, true}) {
    const auto backend = std::make_shared<FailingBackend>();
    EngineConfig config = tiny_config();
    config.host_slots = has_host_pool ? 4 : 0;
    Engine engine(config, random_weights(spec, backend), pingpong(1, 1));
    const Batch batch = prompt_batch({5, 9}, 2, kPageSize, spec.vocab_size);
    const std::vector<float> expected = engine.submit(batch).wait().logits;
    backend->fails = true;
    const StepHandle failed = engine.submit(batch), behind = engine.submit(batch);
    CHECK_THROWS_WITH(failed.wait(), "planted");
    CHECK_THROWS_WITH(behind.wait(), "planted");
    CHECK_THROWS_WITH(engine.submit(batch), "planted");
    backend->fails = false;
    engine.restart();
    const StepHandle next = engine.submit(batch);
    CHECK(next.step() == 4);
    CHECK(next.wait().logits == expected);
  }
}

TEST_CASE("a restart is refused while steps are in flight, and tells what the device reports") {
  const ModelSpec spec = tiny_spec();
  const auto backend = std::make_shared<FailingBackend>();
  EngineConfig config = tiny_config();
  config.jitter_us = 20000;  // keeps steps in flight
  Engine engine(config, random_weights(spec, backend), pingpong(1, 1));
  const StepHandle step = engine.submit(prompt_batch({5, 9}, 2, kPageSize, spec.vocab_size));
  CHECK_THROWS_WITH_AS(engine.restart(), "1 steps are in flight; wait for them before restart()",
                       Error);
  step.wait();
  backend->events_fail = true;
  CHECK_THROWS_WITH_AS(engine.restart(),
                       "the device reports an error even after a restart, so that this process "
                       "cannot use it any more; start another one: gone for good",
                       Error);
}  // where the engine ends, though the device has failed for good
