#include "pipeline/batch.h"

#include <limits>
#include <string_view>

#include "core/error.h"
#include "kernels/ops.h"

namespace nanoflow {
namespace {

template <typename T>
void check_size(std::string_view name, const std::vector<T>& array, size_t size) {
  NF_CHECK(array.size() == size, "batch: ", name, " has ", array.size(), " entries, not ", size);
}

template <typename T>
void check_range(std::string_view name, const std::vector<T>& array, T low, T high) {
  for (size_t i = 0; i < array.size(); ++i) {
    NF_CHECK(low <= array[i] && array[i] <= high, "batch: ", name, "[", i, "] is ", array[i],
             ", outside [", low, ", ", high, "]");
  }
}

void check_indptr(std::string_view name, const std::vector<int32_t>& indptr, size_t entries,
                  int64_t total) {
  check_size(name, indptr, entries + 1);
  NF_CHECK(indptr.front() == 0 && indptr.back() == total, "batch: ", name, " runs from ",
           indptr.front(), " to ", indptr.back(), ", not from 0 to ", total);
  for (size_t i = 0; i < entries; ++i) {
    NF_CHECK(indptr[i] <= indptr[i + 1], "batch: ", name, "[", i + 1, "] is ", indptr[i + 1],
             ", below ", indptr[i]);
  }
}

void check_request(const Batch& batch, const BatchLimits& limits, int r) {
  const int rows = batch.request_indptr[r + 1] - batch.request_indptr[r];
  const int pages = batch.page_indptr[r + 1] - batch.page_indptr[r];
  const int length = batch.kv_len[r];
  NF_CHECK(rows >= 1, "batch: request ", r, " has no rows");
  NF_CHECK(rows <= length && length <= limits.max_positions, "batch: request ", r, " has ", rows,
           " rows but kv_len ", length, " (at most ", limits.max_positions, ")");
  NF_CHECK(pages * limits.page_size >= length, "batch: request ", r, " keeps ", length,
           " keys but has ", pages, " pages of ", limits.page_size);
  for (int i = 0; i < rows; ++i) {
    const int row = batch.request_indptr[r] + i;
    NF_CHECK(batch.positions[row] == length - rows + i, "batch: row ", row, " of request ", r,
             " is at position ", batch.positions[row], ", not ", length - rows + i);
  }
}

void check_samples(const Batch& batch, const BatchLimits& limits) {
  const auto samples = static_cast<size_t>(batch.samples());
  NF_CHECK(batch.samples() <= limits.max_samples, "batch: ", samples, " sampled rows, at most ",
           limits.max_samples);
  check_range("sample_rows", batch.sample_rows, 0, batch.rows() - 1);
  check_size("slots", batch.slots, samples);
  check_range("slots", batch.slots, -1, limits.num_slots - 1);
  check_size("temperature", batch.temperature, samples);
  check_range("temperature", batch.temperature, 0.0f, 1e30f);
  check_size("top_p", batch.top_p, samples);
  check_range("top_p", batch.top_p, 0.0f, 1.0f);
  check_size("min_p", batch.min_p, samples);
  check_range("min_p", batch.min_p, 0.0f, 1.0f);
  check_size("top_k", batch.top_k, samples);
  check_range("top_k", batch.top_k, 0, limits.vocab_size);
  check_size("seed", batch.seed, samples);
  check_size("counter", batch.counter, samples);
  check_indptr("banned_indptr", batch.banned_indptr, samples,
               static_cast<int64_t>(batch.banned.size()));
  NF_CHECK(static_cast<int>(batch.banned.size()) <= limits.max_banned,
           "batch: ", batch.banned.size(), " banned tokens, at most ", limits.max_banned);
  check_range("banned", batch.banned, 0, limits.vocab_size - 1);
  std::vector<bool> taken(static_cast<size_t>(limits.num_slots), false);
  for (size_t i = 0; i < samples; ++i) {
    const int32_t slot = batch.slots[i];
    const bool is_scored = !batch.targets.empty() && batch.targets[i] >= 0;
    NF_CHECK((slot < 0) == is_scored, "batch: sample ", i, " has slot ", slot,
             is_scored ? ", but is scored" : " but no target");
    if (is_scored) continue;
    NF_CHECK(!taken[slot], "batch: slot ", slot, " takes two samples");
    taken[slot] = true;
  }
}

void check_penalties(const Batch& batch, const BatchLimits& limits) {
  if (!batch.has_penalties()) return;
  const auto samples = static_cast<size_t>(batch.samples());
  const float least = std::numeric_limits<float>::min(), most = std::numeric_limits<float>::max();
  check_size("presence_penalty", batch.presence_penalty, samples);
  check_range("presence_penalty", batch.presence_penalty, -most, most);
  check_size("frequency_penalty", batch.frequency_penalty, samples);
  check_range("frequency_penalty", batch.frequency_penalty, -most, most);
  check_size("repetition_penalty", batch.repetition_penalty, samples);
  check_range("repetition_penalty", batch.repetition_penalty, least, most);
  check_indptr("history_indptr", batch.history_indptr, samples,
               static_cast<int64_t>(batch.history_tokens.size()));
  check_range("history_tokens", batch.history_tokens, 0, limits.vocab_size - 1);
  for (int i = 0; i < batch.samples(); ++i) {
    const int32_t length = batch.positions[batch.sample_rows[i]] + 1;
    const int32_t given = batch.history_indptr[i + 1] - batch.history_indptr[i];
    NF_CHECK(given == 0 || given == length, "batch: the history of sample ", i, " begins with ",
             given, " tokens, not with all ", length);
    NF_CHECK(!batch.has_penalties(i) || (batch.counter[i] >= 0 && batch.counter[i] <= length),
             "batch: counter[", i, "] is ", batch.counter[i], " of ", length, " tokens");
  }
}

void check_constraints(const Batch& batch, const BatchLimits& limits) {
  const auto samples = static_cast<size_t>(batch.samples());
  if (batch.has_biases()) {
    check_indptr("bias_indptr", batch.bias_indptr, samples,
                 static_cast<int64_t>(batch.bias_tokens.size()));
    check_size("bias_values", batch.bias_values, batch.bias_tokens.size());
    NF_CHECK(static_cast<int>(batch.bias_tokens.size()) <= limits.max_biases,
             "batch: ", batch.bias_tokens.size(), " biases, at most ", limits.max_biases);
    check_range("bias_tokens", batch.bias_tokens, 0, limits.vocab_size - 1);
  }
  if (batch.has_masks()) {
    const size_t words = (static_cast<size_t>(limits.vocab_size) + 31) / 32;
    const size_t masks = batch.masks.size() / words;
    NF_CHECK(batch.masks.size() == masks * words, "batch: masks has ", batch.masks.size(),
             " words, no multiple of ", words);
    NF_CHECK(static_cast<int>(masks) <= limits.max_requests, "batch: ", masks, " masks, at most ",
             limits.max_requests);
    check_size("mask_rows", batch.mask_rows, samples);
    check_range("mask_rows", batch.mask_rows, -1, static_cast<int32_t>(masks) - 1);
  }
}

void check_logprobs(const Batch& batch, const BatchLimits& limits) {
  const auto samples = static_cast<size_t>(batch.samples());
  if (batch.wants_logprobs()) {
    check_size("logprobs", batch.logprobs, samples);
    check_range("logprobs", batch.logprobs, -1, Logprobs::kMaxTop);
  }
  if (batch.targets.empty()) return;
  check_size("targets", batch.targets, samples);
  check_range("targets", batch.targets, -1, limits.vocab_size - 1);
  NF_CHECK(batch.wants_logprobs(), "batch: there are targets but no logprobs");
}

}  // namespace

bool Batch::is_changed(int sample) const {
  return banned_indptr[sample] < banned_indptr[sample + 1] || has_penalties(sample) ||
         (has_biases() && bias_indptr[sample] < bias_indptr[sample + 1]) ||
         (has_masks() && mask_rows[sample] >= 0);
}

bool Batch::has_penalties(int sample) const {
  return has_penalties() && (presence_penalty[sample] != 0 || frequency_penalty[sample] != 0 ||
                             repetition_penalty[sample] != 1);
}

void validate(const Batch& batch, const BatchLimits& limits) {
  const int rows = batch.rows(), requests = batch.requests();
  NF_CHECK(rows >= 1 && rows <= limits.max_rows, "batch: ", rows, " rows; a step takes 1 to ",
           limits.max_rows, " (max_num_batched_tokens)");
  NF_CHECK(requests >= 1 && requests <= limits.max_requests, "batch: ", requests,
           " requests; a step takes 1 to ", limits.max_requests, " (max_num_seqs)");
  check_range("tokens", batch.tokens, -limits.num_slots, limits.vocab_size - 1);
  check_size("positions", batch.positions, batch.tokens.size());
  check_indptr("request_indptr", batch.request_indptr, batch.kv_len.size(), rows);
  check_indptr("page_indptr", batch.page_indptr, batch.kv_len.size(),
               static_cast<int64_t>(batch.page_indices.size()));
  NF_CHECK(static_cast<int>(batch.page_indices.size()) <= limits.max_page_entries,
           "batch: ", batch.page_indices.size(), " page entries, at most ",
           limits.max_page_entries);
  check_range("page_indices", batch.page_indices, 0, limits.num_pages - 1);
  check_indptr("segment_requests", batch.segment_requests, static_cast<size_t>(limits.segments),
               requests);
  for (int r = 0; r < requests; ++r) check_request(batch, limits, r);
  check_logprobs(batch, limits);
  check_samples(batch, limits);
  check_penalties(batch, limits);
  check_constraints(batch, limits);
}

}  // namespace nanoflow
