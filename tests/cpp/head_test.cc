#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "kernels/ops.h"
#include "pipeline/engine.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

/// Four prompts: the second has penalties, the first and the second ask for logprobs.
Batch asking_batch(int vocab_size) {
  Batch batch = prompt_batch({5, 9, 1, 2}, 2, kPageSize, vocab_size);
  batch.presence_penalty = {0.0f, 2.0f, 0.0f, 0.0f};
  batch.frequency_penalty.assign(4, 0.0f);
  batch.repetition_penalty = {1.0f, 1e6f, 1.0f, 1.0f};
  batch.history_indptr = {0, 0, 9, 9, 9};
  batch.history_tokens.assign(batch.tokens.begin() + 5, batch.tokens.begin() + 14);
  batch.logprobs = {3, 20, -1, -1};
  return batch;
}

/// The decode step that follows `step` samples of the prompts.
Batch next_batch(const Batch& prompts, int step) {
  Batch batch = prompts;
  batch.tokens.clear();
  batch.positions.clear();
  batch.request_indptr = {0};
  batch.history_indptr.assign(5, 0);
  batch.history_tokens.clear();
  for (int r = 0; r < prompts.requests(); ++r) {
    batch.kv_len[r] = prompts.kv_len[r] + step;
    batch.tokens.push_back(-1 - prompts.slots[r]);
    batch.positions.push_back(batch.kv_len[r] - 1);
    batch.request_indptr.push_back(r + 1);
    batch.sample_rows[r] = r;
    batch.counter[r] = step;
  }
  return batch;
}

/// Of a row of logits that nothing has changed.
void check_logprobs(const StepResult& result, int row, int vocab_size) {
  const float* logits = result.logits.data() + static_cast<ptrdiff_t>(row) * vocab_size;
  double sum = 0;
  for (int token = 0; token < vocab_size; ++token) sum += std::exp(double{logits[token]});
  const int32_t* top = result.logprobs.top.data() + row * Logprobs::kMaxTop;
  const float* logprobs = result.logprobs.logprobs.data() + row * (1 + Logprobs::kMaxTop);
  const int32_t sampled = result.tokens[row];
  CHECK(logprobs[0] == doctest::Approx(logits[sampled] - std::log(sum)));
  CHECK(top[0] == std::max_element(logits, logits + vocab_size) - logits);
  for (int i = 0; i < 3; ++i) {
    CHECK(logprobs[1 + i] == doctest::Approx(logits[top[i]] - std::log(sum)));
  }
  CHECK(result.logprobs.ranks[row] ==
        std::count_if(logits, logits + vocab_size, [&](float x) { return x >= logits[sampled]; }));
}

}  // namespace

TEST_CASE("penalties see what steps in flight sample, logprobs what the model gave") {
  const ModelSpec spec = tiny_spec();
  const EngineConfig config{.max_num_batched_tokens = 64,
                            .max_num_seqs = 8,
                            .max_model_len = 32,
                            .page_size = kPageSize,
                            .num_pages = 64,
                            .jitter_us = 100};
  const auto backend = make_backend({.device = {}, .threads = 3, .isa = "auto"});
  Engine engine(config, random_weights(spec, backend), pingpong(2, 1));
  const Batch prompts = asking_batch(spec.vocab_size);
  std::vector<StepHandle> steps{engine.submit(prompts)};
  for (int step = 1; step <= 2; ++step) {
    steps.push_back(engine.submit(next_batch(prompts, step)));
    steps[step - 1].wait();
  }
  std::set<int32_t> seen(prompts.history_tokens.begin(), prompts.history_tokens.end());
  for (const StepHandle& step : steps) {
    const StepResult& result = step.wait();
    CHECK(result.logprobs.ranks.size() == 4);
    check_logprobs(result, 0, spec.vocab_size);
    check_logprobs(result, 1, spec.vocab_size);
    CHECK(result.logprobs.ranks[0] == 1);
    CHECK(seen.insert(result.tokens[1]).second);
  }
}

TEST_CASE("a step that nobody asks has no logprobs, and one without samples has no head") {
  const ModelSpec spec = tiny_spec(1);
  const EngineConfig config{.max_num_seqs = 8, .page_size = 4, .num_pages = 512};
  const auto backend = make_backend({.device = {}, .threads = 2, .isa = "auto"});
  Engine engine(config, random_weights(spec, backend), sequential(2));
  Batch batch = prompt_batch({5, 9}, 1, kPageSize, spec.vocab_size);
  CHECK(engine.submit(batch).wait().logprobs.ranks.empty());
  batch.sample_rows.clear();
  batch.slots.clear();
  for (auto* floats : {&batch.temperature, &batch.top_p, &batch.min_p}) floats->clear();
  for (auto* ints : {&batch.top_k, &batch.counter}) ints->clear();
  batch.seed.clear();
  batch.banned_indptr = {0};
  CHECK(engine.submit(batch).wait().tokens.empty());
}
