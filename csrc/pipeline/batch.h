#pragma once

#include <cstdint>
#include <vector>

namespace nanoflow {

/// What limits a batch must keep, for validate().
struct BatchLimits {
  int vocab_size, max_rows, max_requests, max_positions;
  int max_samples;  // and scored rows
  int num_pages, page_size, max_page_entries;
  int num_slots, max_banned, max_biases;
  int segments;  // of the schedule
};

/// One ragged step: rows of several requests, each some prompt tokens (prefill) or one token
/// (decode). Rows of a request are consecutive; requests are grouped by segment, the finest
/// nano-batches of the schedule, so that no request straddles a split.
struct Batch {
  std::vector<int32_t> tokens;          // [T] token id, or -1 - slot: the last sample of that slot
  std::vector<int32_t> positions;       // [T] of the token in its request, from 0
  std::vector<int32_t> request_indptr;  // [R + 1] first row of each request
  std::vector<int32_t> kv_len;          // [R] keys once this step's rows are appended
  std::vector<int32_t> page_indptr;     // [R + 1] first entry of each request in page_indices
  std::vector<int32_t> page_indices;    // pages of the requests, in order of position
  std::vector<int32_t> segment_requests;  // [segments + 1] first request of each segment

  std::vector<int32_t> sample_rows;  // [S] rows whose next token is sampled, or scored
  std::vector<int32_t> slots;      // [S] token pool slot that takes the sample; each at most once;
                                   // -1: the row is scored
  std::vector<float> temperature;  // [S] >= 0; 0 is greedy
  std::vector<float> top_p;        // [S] in (0, 1]
  std::vector<float> min_p;        // [S] in [0, 1]
  std::vector<int32_t> top_k;      // [S] 0 keeps all
  std::vector<uint64_t> seed;      // [S]
  std::vector<int32_t> counter;    // [S] tokens the request has sampled before
  std::vector<int32_t> banned_indptr;  // [S + 1]
  std::vector<int32_t> banned;         // tokens that must not be sampled

  // All empty, or some row has penalties: see PenaltyTables. Rows that have them keep a history in
  // their slot, which begins with the first sample that the request takes there.
  std::vector<float> presence_penalty;    // [S]
  std::vector<float> frequency_penalty;   // [S]
  std::vector<float> repetition_penalty;  // [S] above 0; 1 without penalties, as 0 is of the others
  std::vector<int32_t> history_indptr;    // [S + 1]
  std::vector<int32_t> history_tokens;    // of rows whose history begins: all up to the row's own

  // All empty, or some row has biases: a row names a token once at most.
  std::vector<int32_t> bias_indptr;  // [S + 1]
  std::vector<int32_t> bias_tokens;
  std::vector<float> bias_values;  // added to their logits, before penalties

  // Both empty, or some row may sample certain tokens only.
  std::vector<int32_t> mask_rows;  // [S] of masks, or -1: all tokens
  std::vector<int32_t> masks;  // [requests at most, ceil(V / 32)] token t is bit t % 32 of t / 32

  // Empty, or some row wants logprobs.
  std::vector<int32_t> logprobs;  // [S] of how many tokens beside the sampled one, or -1
  // Empty, or some row is scored: the logprob of a token that is known already is wanted.
  std::vector<int32_t> targets;  // [S] that token; -1 where the next one is sampled

  bool want_logits = false;   // return the logits of the sampled rows
  bool want_timings = false;  // return when each op ran

  int rows() const { return static_cast<int>(tokens.size()); }
  int requests() const { return static_cast<int>(kv_len.size()); }
  int samples() const { return static_cast<int>(sample_rows.size()); }
  bool has_penalties() const { return !repetition_penalty.empty(); }
  bool has_penalties(int sample) const;
  bool has_biases() const { return !bias_indptr.empty(); }
  bool has_masks() const { return !mask_rows.empty(); }
  bool wants_logprobs() const { return !logprobs.empty(); }
  /// Whether something changes a row's logits before the sample is drawn.
  bool is_changed(int sample) const;
  /// First row of a segment (segments() gives T).
  int segment_row(int segment) const { return request_indptr[segment_requests[segment]]; }
};

/// Throws Error naming the first array, index and value that break the contract.
void validate(const Batch& batch, const BatchLimits& limits);

}  // namespace nanoflow
