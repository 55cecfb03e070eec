#include "pipeline/workspace.h"

#include <algorithm>

#include "core/error.h"
#include "pipeline/buckets.h"

namespace nanoflow {
namespace {

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

int max_page_entries(const EngineConfig& config) {
  const int pages = (config.max_model_len + config.page_size - 1) / config.page_size;
  return config.max_num_seqs * pages;
}

/// Logprobs are told of the logits that the model gave.
HeadOptions head_options(const Batch& batch) {
  HeadOptions head{.bias = batch.has_biases(),
                   .penalties = batch.has_penalties(),
                   .masks = batch.has_masks(),
                   .logprobs = batch.wants_logprobs()};
  for (int i = 0; head.logprobs && i < batch.samples(); ++i) {
    head.logits_again = head.logits_again || (batch.logprobs[i] >= 0 && batch.is_changed(i));
  }
  return head;
}

}  // namespace

Workspace::Workspace(const EngineConfig& config, const ModelSpec& spec, Backend& backend,
                     bool gathers)
    : config_(config),
      spec_(spec),
      backend_(backend),
      granularity_(config.row_granularity > 0 ? config.row_granularity
                                              : backend.row_granularity()) {
  allocate_activations(gathers);
  allocate_tables();
  upload_rope_tables();
}

const DecoderBuffers& Workspace::bind(const KvCache& cache) {
  num_pages_ = cache.num_pages();
  for (int layer = 0; layer < spec_.num_layers; ++layer) {
    buffers_.k_cache.push_back(cache.k(layer));
    buffers_.v_cache.push_back(cache.v(layer));
  }
  return buffers_;
}

size_t Workspace::gather_work_bytes(int64_t rows, int64_t samples, bool gathers) const {
  if (spec_.ranks == 1) return 0;
  const int64_t logits = samples * spec_.vocab_share();
  const int64_t columns =
      std::max(int64_t{spec_.num_heads} * spec_.head_dim, int64_t{spec_.hidden_size} / spec_.ranks);
  const size_t largest =
      std::max(static_cast<size_t>(logits) * sizeof(float),
               gathers ? static_cast<size_t>(rows * columns) * size_of(spec_.dtype) : size_t{0});
  return backend_.communicator().gather_work_bytes(largest);
}

void Workspace::allocate_activations(bool gathers) {
  const int64_t rows = config_.max_num_batched_tokens + kMaxSegments * granularity_;
  const int64_t samples = round_up(max_samples(), granularity_);
  const int64_t biases = int64_t{config_.max_num_seqs} * kBiasesPerRequest;
  const int64_t hidden = spec_.hidden_size;
  const DType dtype = spec_.dtype;
  const size_t attention_bytes = backend_.attention_work_bytes(
      config_.max_num_seqs, static_cast<int>(rows), spec_.num_heads, spec_.num_kv_heads);
  const size_t gather_bytes = gather_work_bytes(rows, samples, gathers);
  const auto words = [](size_t bytes) { return elements_for(DType::kI32, bytes); };
  const bool has_ranks = spec_.ranks > 1;
  Arena& a = activations_;
  a.add("residual", dtype, {rows, hidden});
  a.add("normed", dtype, {rows, hidden});
  a.add("qkv", dtype, {rows, spec_.qkv_size()});
  a.add("attention_out", dtype, {rows, static_cast<int64_t>(spec_.num_heads) * spec_.head_dim});
  a.add("activated", dtype, {rows * std::max(1, spec_.experts_per_token), spec_.intermediate_size});
  if (spec_.has_experts()) describe_experts(rows);
  a.add("head_residual", dtype, {samples, hidden});
  a.add("head_normed", dtype, {samples, hidden});
  a.add("logits", DType::kF32, {samples, spec_.vocab_size});
  a.add("token_pool", DType::kI32, {config_.max_num_seqs});
  a.add("sampled", DType::kI32, {samples});
  a.add("history", DType::kI32, {config_.max_num_seqs, config_.max_model_len});
  a.add("bias_tokens", DType::kI32, {biases});
  a.add("bias_values", DType::kF32, {biases});
  a.add("masks", DType::kI32, {config_.max_num_seqs, (spec_.vocab_size + 31) / 32});
  a.add("top", DType::kI32, {samples, Logprobs::kMaxTop});
  a.add("logprobs", DType::kF32, {samples, 1 + Logprobs::kMaxTop});
  a.add("ranks", DType::kI32, {samples});
  const bool has_local_rope = !spec_.rope_local_inv_freq.empty();
  a.add("cos_sin", DType::kF32, {config_.max_model_len, spec_.head_dim});
  if (has_local_rope) a.add("cos_sin_local", DType::kF32, {config_.max_model_len, spec_.head_dim});
  if (attention_bytes > 0) {
    const auto plans = static_cast<int64_t>(spec_.distinct_windows().size());
    a.add("attention_work", DType::kI32, {plans, kMaxSegments, words(attention_bytes)});
  }
  if (has_ranks) a.add("own_logits", DType::kF32, {samples, spec_.vocab_share()});
  if (has_ranks && gathers) {
    a.add("gathered", dtype, {rows, int64_t{spec_.all_heads()} * spec_.head_dim});
  }
  if (gather_bytes > 0) a.add("gather_work", DType::kI32, {words(gather_bytes)});
  a.bind(backend_.allocate(a.bytes()));
  if (attention_bytes > 0) buffers_.attention_work = a.tensor("attention_work");
  if (has_ranks) buffers_.own_logits = a.tensor("own_logits");
  if (has_ranks && gathers) buffers_.gathered = a.tensor("gathered");
  if (gather_bytes > 0) buffers_.gather_work = a.tensor("gather_work");
  buffers_.residual = a.tensor("residual");
  buffers_.normed = a.tensor("normed");
  buffers_.qkv = a.tensor("qkv");
  buffers_.attention_out = a.tensor("attention_out");
  buffers_.activated = a.tensor("activated");
  if (spec_.has_experts()) bind_experts();
  buffers_.head_residual = a.tensor("head_residual");
  buffers_.head_normed = a.tensor("head_normed");
  buffers_.logits = a.tensor("logits");
  buffers_.token_pool = a.tensor("token_pool");
  buffers_.sampled = a.tensor("sampled");
  buffers_.history = a.tensor("history");
  buffers_.bias.tokens = a.tensor("bias_tokens");
  buffers_.bias.values = a.tensor("bias_values");
  buffers_.masks.masks = a.tensor("masks");
  buffers_.top = a.tensor("top");
  buffers_.logprobs = a.tensor("logprobs");
  buffers_.ranks = a.tensor("ranks");
  buffers_.cos_sin = a.tensor("cos_sin");
  if (has_local_rope) buffers_.cos_sin_local = a.tensor("cos_sin_local");
}

void Workspace::describe_experts(int64_t rows) {
  const int64_t active = spec_.experts_per_token;
  Arena& a = activations_;
  a.add("expert_logits", DType::kF32, {rows, spec_.num_experts});
  a.add("expert_chosen", DType::kI32, {rows, active});
  a.add("expert_weights", DType::kF32, {rows, active});
  a.add("expert_places", DType::kI32, {rows, active});
  a.add("expert_sources", DType::kI32, {rows * active});
  a.add("expert_offsets", DType::kI32, {kMaxSegments, spec_.num_experts + 1});
  a.add("expert_values", spec_.dtype, {rows * active, spec_.hidden_size});
}

void Workspace::bind_experts() {
  const Arena& a = activations_;
  buffers_.experts = {.logits = a.tensor("expert_logits"),
                      .chosen = a.tensor("expert_chosen"),
                      .weights = a.tensor("expert_weights"),
                      .places = a.tensor("expert_places"),
                      .sources = a.tensor("expert_sources"),
                      .offsets = a.tensor("expert_offsets"),
                      .values = a.tensor("expert_values")};
}

void Workspace::allocate_tables() {
  const int64_t rows = buffers_.residual.size(0), samples = buffers_.sampled.size(0);
  const int64_t requests = config_.max_num_seqs;
  Arena& t = tables_;
  // The two lists that a step seldom fills lie at the ends, the first against what follows it, so
  // that what a step uses is one piece.
  t.add("banned", DType::kI32, {requests * kBannedPerRequest});
  t.add("tokens", DType::kI32, {rows});
  t.add("positions", DType::kI32, {rows});
  t.add("kv_slots", DType::kI32, {rows});
  t.add("sample_rows", DType::kI32, {samples});
  t.add("segment_requests", DType::kI32, {kMaxSegments + 1});
  t.add("row_begin", DType::kI32, {requests});
  t.add("row_count", DType::kI32, {requests});
  t.add("kv_len", DType::kI32, {requests});
  t.add("page_indptr", DType::kI32, {requests + 1});
  t.add("slots", DType::kI32, {samples});
  t.add("temperature", DType::kF32, {samples});
  t.add("top_p", DType::kF32, {samples});
  t.add("min_p", DType::kF32, {samples});
  t.add("top_k", DType::kI32, {samples});
  t.add("seed", DType::kU64, {samples});
  t.add("counter", DType::kI32, {samples});
  t.add("banned_indptr", DType::kI32, {samples + 1});
  t.add("history_length", DType::kI32, {samples});
  t.add("presence", DType::kF32, {samples});
  t.add("frequency", DType::kF32, {samples});
  t.add("repetition", DType::kF32, {samples});
  t.add("bias_indptr", DType::kI32, {samples + 1});
  t.add("mask_rows", DType::kI32, {samples});
  t.add("logprob_counts", DType::kI32, {samples});
  t.add("logprob_targets", DType::kI32, {samples});
  t.add("page_indices", DType::kI32, {max_page_entries(config_)});
  t.bind(backend_.allocate(t.bytes()));
  for (Buffer& buffer : staging_) buffer = backend_.allocate_host(t.bytes());
  buffers_.tokens = t.tensor("tokens");
  buffers_.positions = t.tensor("positions");
  buffers_.kv_slots = t.tensor("kv_slots");
  buffers_.sample_rows = t.tensor("sample_rows");
  buffers_.attention = {.segment_requests = t.tensor("segment_requests"),
                        .row_begin = t.tensor("row_begin"),
                        .row_count = t.tensor("row_count"),
                        .kv_len = t.tensor("kv_len"),
                        .page_indptr = t.tensor("page_indptr"),
                        .page_indices = t.tensor("page_indices")};
  buffers_.sampling = {.slots = t.tensor("slots"),
                       .temperature = t.tensor("temperature"),
                       .top_p = t.tensor("top_p"),
                       .min_p = t.tensor("min_p"),
                       .top_k = t.tensor("top_k"),
                       .seed = t.tensor("seed"),
                       .counter = t.tensor("counter"),
                       .banned_indptr = t.tensor("banned_indptr"),
                       .banned = t.tensor("banned")};
  buffers_.penalties = {.slots = t.tensor("slots"),
                        .length = t.tensor("history_length"),
                        .generated = t.tensor("counter"),
                        .presence = t.tensor("presence"),
                        .frequency = t.tensor("frequency"),
                        .repetition = t.tensor("repetition")};
  buffers_.bias.indptr = t.tensor("bias_indptr");
  buffers_.masks.rows = t.tensor("mask_rows");
  buffers_.logprob_counts = t.tensor("logprob_counts");
  buffers_.logprob_targets = t.tensor("logprob_targets");
}

void Workspace::upload_rope_tables() {
  upload_rope_table(buffers_.cos_sin, spec_.rope_inv_freq, spec_.rope_attention_factor);
  if (buffers_.cos_sin_local) {
    upload_rope_table(buffers_.cos_sin_local, spec_.rope_local_inv_freq, 1.0f);
  }
}

void Workspace::upload_rope_table(const Tensor& to, const std::vector<float>& inv_freq,
                                  float attention_factor) {
  const std::vector<float> table = rope_table(inv_freq, attention_factor, config_.max_model_len);
  const auto lane = backend_.make_lane(1);
  const auto done = backend_.make_event();
  backend_.copy(to.bytes(), table.data(), table.size() * sizeof(float), *lane);
  lane->record(*done);
  done->synchronize();
}

BatchLimits Workspace::limits(int segments) const {
  return {.vocab_size = spec_.vocab_size,
          .max_rows = config_.max_num_batched_tokens,
          .max_requests = config_.max_num_seqs,
          .max_positions = config_.max_model_len,
          .max_samples = max_samples(),
          .num_pages = num_pages_,
          .page_size = config_.page_size,
          .max_page_entries = max_page_entries(config_),
          .num_slots = config_.max_num_seqs,
          .max_banned = config_.max_num_seqs * kBannedPerRequest,
          .max_biases = config_.max_num_seqs * kBiasesPerRequest,
          .segments = segments};
}

PlanKey Workspace::padded(const std::vector<int>& segment_rows, int samples,
                          const std::vector<double>& cuts) const {
  NF_CHECK(segment_rows.size() <= kMaxSegments, "a step has at most ", kMaxSegments,
           " segments, not ", segment_rows.size());
  return {.segment_rows =
              bucket_segments(segment_rows, cuts, granularity_, config_.max_num_batched_tokens),
          .samples = bucket_of(samples, granularity_, max_samples())};
}

PlanKey Workspace::key_of(const Batch& batch, const std::vector<double>& cuts) const {
  std::vector<int> rows;
  for (size_t s = 0; s + 1 < batch.segment_requests.size(); ++s) {
    rows.push_back(batch.segment_row(static_cast<int>(s) + 1) -
                   batch.segment_row(static_cast<int>(s)));
  }
  PlanKey key = padded(rows, batch.samples(), cuts);
  key.options = head_options(batch);
  return key;
}

}  // namespace nanoflow
