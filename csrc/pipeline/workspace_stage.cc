#include <algorithm>

#include "pipeline/workspace.h"

// From a batch to the staging copies of the step tables, and from there to the device.

namespace nanoflow {

template <typename T>
T* Workspace::staged(const Tensor& table, int ring) const {
  return reinterpret_cast<T*>(staging_[ring].data() + (table.bytes() - tables_.data()));
}

void Workspace::stage(const Batch& batch, const PlanKey& key, int ring) {
  stage_rows(batch, key, ring);
  stage_samples(batch, key, ring);
  stage_penalties(batch, key, ring);
  stage_constraints(batch, key, ring);
  stage_logprobs(batch, key, ring);
}

void Workspace::stage_rows(const Batch& batch, const PlanKey& key, int ring) {
  const DecoderBuffers& b = buffers_;
  int32_t* tokens = staged<int32_t>(b.tokens, ring);
  int32_t* positions = staged<int32_t>(b.positions, ring);
  int32_t* kv_slots = staged<int32_t>(b.kv_slots, ring);
  int32_t* row_begin = staged<int32_t>(b.attention.row_begin, ring);
  int32_t* row_count = staged<int32_t>(b.attention.row_count, ring);
  padded_row_.resize(batch.tokens.size());
  int padded_begin = 0;
  for (size_t s = 0; s < key.segment_rows.size(); ++s) {
    const int padded_end = padded_begin + key.segment_rows[s];
    int out = padded_begin;
    for (int r = batch.segment_requests[s]; r < batch.segment_requests[s + 1]; ++r) {
      row_begin[r] = out;
      row_count[r] = batch.request_indptr[r + 1] - batch.request_indptr[r];
      const int32_t* pages = batch.page_indices.data() + batch.page_indptr[r];
      for (int row = batch.request_indptr[r]; row < batch.request_indptr[r + 1]; ++row, ++out) {
        const int position = batch.positions[row];
        tokens[out] = batch.tokens[row];
        positions[out] = position;
        kv_slots[out] =
            pages[position / config_.page_size] * config_.page_size + position % config_.page_size;
        padded_row_[row] = out;
      }
    }
    for (; out < padded_end; ++out) {
      tokens[out] = positions[out] = 0;
      kv_slots[out] = -1;
    }
    padded_begin = padded_end;
  }
  const AttentionTables& a = b.attention;
  std::ranges::copy(batch.segment_requests, staged<int32_t>(a.segment_requests, ring));
  std::ranges::copy(batch.kv_len, staged<int32_t>(a.kv_len, ring));
  std::ranges::copy(batch.page_indptr, staged<int32_t>(a.page_indptr, ring));
  std::ranges::copy(batch.page_indices, staged<int32_t>(a.page_indices, ring));
}

template <typename T>
void Workspace::stage_padded(const Tensor& table, const std::vector<T>& values, int size, T padding,
                             int ring) {
  T* out = staged<T>(table, ring);
  std::fill(std::ranges::copy(values, out).out, out + size, padding);
}

void Workspace::stage_samples(const Batch& batch, const PlanKey& key, int ring) {
  const DecoderBuffers& b = buffers_;
  const SamplingTables& s = b.sampling;
  const int samples = batch.samples();
  int32_t* rows = staged<int32_t>(b.sample_rows, ring);
  for (int i = 0; i < samples; ++i) rows[i] = padded_row_[batch.sample_rows[i]];
  const auto fill = [&](const Tensor& table, const auto& values, auto padding) {
    stage_padded(table, values, key.samples, padding, ring);
  };
  std::fill(rows + samples, rows + key.samples, -1);
  fill(s.slots, batch.slots, -1);
  fill(s.temperature, batch.temperature, 0.0f);
  fill(s.top_p, batch.top_p, 1.0f);
  fill(s.min_p, batch.min_p, 0.0f);
  fill(s.top_k, batch.top_k, 0);
  fill(s.seed, batch.seed, uint64_t{0});
  fill(s.counter, batch.counter, 0);
  const auto first_banned = static_cast<int32_t>(s.banned.numel()) - batch.banned_indptr.back();
  int32_t* indptr = staged<int32_t>(s.banned_indptr, ring);
  for (int32_t begin : batch.banned_indptr) *indptr++ = first_banned + begin;
  std::fill_n(indptr, key.samples - samples, static_cast<int32_t>(s.banned.numel()));
  std::ranges::copy(batch.banned, staged<int32_t>(s.banned, ring) + first_banned);
}

template <typename T>
void Workspace::stage_list(Buffer& list, const std::vector<T>& values) {
  const size_t bytes = values.size() * sizeof(T);
  if (list.bytes() < bytes) list = backend_.allocate_host(std::max(bytes, 2 * list.bytes()));
  std::ranges::copy(values, reinterpret_cast<T*>(list.data()));
}

void Workspace::stage_penalties(const Batch& batch, const PlanKey& key, int ring) {
  if (!key.options.penalties) return;
  const int samples = batch.samples();
  const auto fill = [&](const Tensor& table, const auto& values, auto padding) {
    stage_padded(table, values, key.samples, padding, ring);
  };
  const PenaltyTables& p = buffers_.penalties;
  fill(p.presence, batch.presence_penalty, 0.0f);
  fill(p.frequency, batch.frequency_penalty, 0.0f);
  fill(p.repetition, batch.repetition_penalty, 1.0f);
  int32_t* length = staged<int32_t>(p.length, ring);
  std::fill(length, length + key.samples, 0);
  for (int i = 0; i < samples; ++i) {
    if (batch.has_penalties(i)) length[i] = batch.positions[batch.sample_rows[i]] + 1;
  }
  stage_list(lists_[ring].histories, batch.history_tokens);
}

void Workspace::stage_constraints(const Batch& batch, const PlanKey& key, int ring) {
  if (key.options.bias) {
    stage_padded(buffers_.bias.indptr, batch.bias_indptr, key.samples + 1, batch.bias_indptr.back(),
                 ring);
    stage_list(lists_[ring].bias_tokens, batch.bias_tokens);
    stage_list(lists_[ring].bias_values, batch.bias_values);
  }
  if (key.options.masks) {
    stage_padded(buffers_.masks.rows, batch.mask_rows, key.samples, -1, ring);
    stage_list(lists_[ring].masks, batch.masks);
  }
}

void Workspace::stage_logprobs(const Batch& batch, const PlanKey& key, int ring) {
  if (!key.options.logprobs) return;
  stage_padded(buffers_.logprob_counts, batch.logprobs, key.samples, -1, ring);
  stage_padded(buffers_.logprob_targets, batch.targets, key.samples, -1, ring);
}

void Workspace::upload(const Batch& batch, int ring, Lane& lane) {
  const auto offset = [this](const Tensor& table) {
    return static_cast<size_t>(table.bytes() - tables_.data());
  };
  const Tensor& banned = buffers_.sampling.banned;
  const size_t begin = offset(banned) + banned.span_bytes() - batch.banned.size() * sizeof(int32_t);
  const size_t end =
      offset(buffers_.attention.page_indices) + batch.page_indices.size() * sizeof(int32_t);
  backend_.copy(tables_.data() + begin, staging_[ring].data() + begin, end - begin, lane);
  const Lists& lists = lists_[ring];
  const auto copy_list = [&](const Tensor& to, const Buffer& from, size_t entries) {
    if (entries > 0) backend_.copy(to.bytes(), from.data(), entries * sizeof(int32_t), lane);
  };
  copy_list(buffers_.bias.tokens, lists.bias_tokens, batch.bias_tokens.size());
  copy_list(buffers_.bias.values, lists.bias_values, batch.bias_values.size());
  copy_list(buffers_.masks.masks, lists.masks, batch.masks.size());
  if (!batch.has_penalties()) return;
  const auto* histories = reinterpret_cast<const int32_t*>(lists.histories.data());
  for (int i = 0; i < batch.samples(); ++i) {
    const int32_t first = batch.history_indptr[i], last = batch.history_indptr[i + 1];
    if (first == last) continue;
    backend_.copy(buffers_.history.select(0, batch.slots[i]).bytes(), histories + first,
                  static_cast<size_t>(last - first) * sizeof(int32_t), lane);
  }
}

}  // namespace nanoflow
