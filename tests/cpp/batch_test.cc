#include "pipeline/batch.h"

#include <doctest/doctest.h>

#include <functional>
#include <limits>

#include "core/error.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

constexpr BatchLimits kLimits{.vocab_size = 61,
                              .max_rows = 64,
                              .max_requests = 4,
                              .max_positions = 32,
                              .max_samples = 6,
                              .num_pages = 16,
                              .page_size = 4,
                              .max_page_entries = 32,
                              .num_slots = 4,
                              .max_banned = 8,
                              .max_biases = 2,
                              .segments = 2};

std::string error_of(const std::function<void(Batch&)>& spoil) {
  Batch batch = prompt_batch({5, 9, 1}, 2, 4, 61);
  batch.presence_penalty = batch.frequency_penalty = {0.0f, 2.0f, 0.0f};
  batch.repetition_penalty = {1.0f, 1.5f, 1.0f};
  batch.history_indptr = {0, 0, 9, 9};
  batch.history_tokens.assign(9, 3);
  batch.logprobs = {-1, 0, 20};
  batch.bias_indptr = {0, 0, 2, 2};
  batch.bias_tokens = {60, 3};
  batch.bias_values = {-100.0f, 2.0f};
  batch.mask_rows = {-1, 0, 0};
  batch.masks = {-1, 7};
  spoil(batch);
  try {
    validate(batch, kLimits);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("a sound batch passes") {
  CHECK(error_of([](Batch&) {}) == "");
}

TEST_CASE("a bad batch says which entry is wrong") {
  CHECK(error_of([](Batch& b) { b.tokens[3] = 61; }) == "batch: tokens[3] is 61, outside [-4, 60]");
  CHECK(error_of([](Batch& b) { b.tokens[3] = -5; }) == "batch: tokens[3] is -5, outside [-4, 60]");
  CHECK(error_of([](Batch& b) { b.positions[6] = 4; }) ==
        "batch: row 6 of request 1 is at position 4, not 1");
  CHECK(error_of([](Batch& b) { b.positions.pop_back(); }) ==
        "batch: positions has 14 entries, not 15");
  CHECK(error_of([](Batch& b) { b.request_indptr[1] = 20; }) ==
        "batch: request_indptr[2] is 14, below 20");
  CHECK(error_of([](Batch& b) { b.kv_len[0] = 40; }) ==
        "batch: request 0 has 5 rows but kv_len 40 (at most 32)");
  CHECK(error_of([](Batch& b) {
          b.kv_len[2] = 5;
          b.positions[14] = 4;
        }) == "batch: request 2 keeps 5 keys but has 1 pages of 4");
  CHECK(error_of([](Batch& b) { b.page_indices[2] = 16; }) ==
        "batch: page_indices[2] is 16, outside [0, 15]");
  CHECK(error_of([](Batch& b) { b.segment_requests = {0, 3}; }) ==
        "batch: segment_requests has 2 entries, not 3");
  CHECK(error_of([](Batch& b) { b.sample_rows[1] = 15; }) ==
        "batch: sample_rows[1] is 15, outside [0, 14]");
  CHECK(error_of([](Batch& b) { b.slots[2] = 0; }) == "batch: slot 0 takes two samples");
  CHECK(error_of([](Batch& b) { b.top_p[0] = 1.5f; }) == "batch: top_p[0] is 1.5, outside [0, 1]");
  CHECK(error_of([](Batch& b) { b.temperature[0] = std::numeric_limits<float>::quiet_NaN(); }) ==
        "batch: temperature[0] is nan, outside [0, 1e+30]");
  CHECK(error_of([](Batch& b) { b.banned = {3}; }) ==
        "batch: banned_indptr runs from 0 to 0, not from 0 to 1");
  CHECK(error_of([](Batch& b) { b.history_tokens[8] = 61; }) ==
        "batch: history_tokens[8] is 61, outside [0, 60]");
  CHECK(error_of([](Batch& b) { b.history_indptr[1] = 2; }) ==
        "batch: the history of sample 0 begins with 2 tokens, not with all 5");
  CHECK(error_of([](Batch& b) { b.counter[1] = 10; }) == "batch: counter[1] is 10 of 9 tokens");
  CHECK(error_of([](Batch& b) { b.frequency_penalty.pop_back(); }) ==
        "batch: frequency_penalty has 2 entries, not 3");
  CHECK(error_of([](Batch& b) {
          b.repetition_penalty[1] = 0.0f;
        }).starts_with("batch: repetition_penalty[1] is 0, outside ["));
  CHECK(error_of([](Batch& b) { b.logprobs[2] = 21; }) ==
        "batch: logprobs[2] is 21, outside [-1, 20]");
  CHECK(error_of([](Batch& b) { b.bias_tokens[0] = 61; }) ==
        "batch: bias_tokens[0] is 61, outside [0, 60]");
  CHECK(error_of([](Batch& b) { b.bias_values.pop_back(); }) ==
        "batch: bias_values has 1 entries, not 2");
  CHECK(error_of([](Batch& b) { b.masks.push_back(1); }) ==
        "batch: masks has 3 words, no multiple of 2");
  CHECK(error_of([](Batch& b) { b.mask_rows[0] = 1; }) ==
        "batch: mask_rows[0] is 1, outside [-1, 0]");
  CHECK(error_of([](Batch& b) { b.masks.assign(10, 1); }) == "batch: 5 masks, at most 4");
  CHECK(error_of([](Batch& b) { b = Batch{}; }) ==
        "batch: 0 rows; a step takes 1 to 64 (max_num_batched_tokens)");
}

TEST_CASE("a row is either sampled into a slot or scored by its target") {
  const auto error_with = [](std::vector<int32_t> slots, std::vector<int32_t> targets) {
    return error_of([&](Batch& b) {
      b.slots = std::move(slots);
      b.targets = std::move(targets);
    });
  };
  CHECK(error_with({0, -1, 1}, {-1, 60, -1}) == "");
  CHECK(error_with({0, -1, 1}, {}) == "batch: sample 1 has slot -1 but no target");
  CHECK(error_with({0, 2, 1}, {-1, 60, -1}) == "batch: sample 1 has slot 2, but is scored");
  CHECK(error_with({0, -1, 1}, {-1, 61, -1}) == "batch: targets[1] is 61, outside [-1, 60]");
  CHECK(error_of([](Batch& b) {
          b.targets = {-1, -1, -1};
          b.logprobs.clear();
        }) == "batch: there are targets but no logprobs");
}
