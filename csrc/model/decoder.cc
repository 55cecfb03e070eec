#include "model/decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"

namespace nanoflow {
namespace {

Tensor rows(const Tensor& tensor, const RowRange& range) {
  return tensor.slice_rows(range.row_begin, range.row_end);
}

KvRows kv_rows(int layer, const RowRange& range) {
  return {.layer = layer, .begin = range.row_begin, .end = range.row_end};
}

}  // namespace

std::string_view to_string(Stage stage) {
  constexpr std::string_view kNames[kNumStages] = {"qkv", "attn", "o", "mlp", "head"};
  return kNames[static_cast<int>(stage)];
}

Decoder::Decoder(std::shared_ptr<const Weights> weights, DecoderBuffers buffers)
    : weights_(std::move(weights)),
      buffers_(std::move(buffers)),
      norms_sums_(spec().ranks > 1 && !spec().post_norms &&
                  weights_->backend()->communicator().norms_sums()) {
  const std::vector<int> windows = spec().distinct_windows();
  for (int layer = 0; layer < spec().num_layers; ++layer) {
    const auto found = std::find(windows.begin(), windows.end(), spec().window(layer));
    const auto plan = static_cast<int>(found - windows.begin());
    plan_of_layer_.push_back(plan);
    if (plan == static_cast<int>(plan_layers_.size())) plan_layers_.push_back(layer);
  }
}

std::vector<Op> Decoder::emit(Stage stage, int layer, const RowRange& range, bool gathers) const {
  switch (stage) {
    case Stage::kQkv:
      return emit_qkv(layer, range);
    case Stage::kAttention:
      return emit_attention(layer, range);
    case Stage::kO:
      return gathers && spec().ranks > 1 ? emit_gathered_o(layer, range) : emit_o(layer, range);
    case Stage::kMlp:
      return emit_mlp(layer, range);
    case Stage::kHead:
      break;
  }
  fail("stage ", to_string(stage), " has no row range; use emit_head");
}

std::vector<Op> Decoder::emit_qkv(int layer, const RowRange& range) const {
  const DecoderBuffers& b = buffers_;
  const Weights::Layer w = weights_->layer(layer);
  const bool is_local = b.cos_sin_local && spec().window(layer) > 0;
  std::vector<Op> ops;
  if (layer == 0) {
    ops.push_back(Embed{.tokens = rows(b.tokens, range),
                        .token_pool = b.token_pool,
                        .table = weights_->embed(),
                        .out = rows(b.residual, range),
                        .scale = spec().embed_scale});
  }
  if (layer == 0 || !norms_sums_) {
    ops.push_back(norm(rows(b.residual, range), w.input_norm, rows(b.normed, range)));
  }
  ops.push_back(Gemm{
      .x = rows(b.normed, range), .weight = w.qkv, .out = rows(b.qkv, range), .bias = w.qkv_bias});
  ops.push_back(RopeAppend{.qkv = rows(b.qkv, range),
                           .positions = rows(b.positions, range),
                           .kv_slots = rows(b.kv_slots, range),
                           .cos_sin = is_local ? b.cos_sin_local : b.cos_sin,
                           .k_cache = b.k_cache[layer],
                           .v_cache = b.v_cache[layer],
                           .q_norm = w.q_norm,
                           .k_norm = w.k_norm,
                           .norm_eps = spec().rms_norm_eps,
                           .norm_unit_offset = spec().norm_unit_offset,
                           .rows = kv_rows(layer, range)});
  return ops;
}

std::vector<Op> Decoder::emit_attention(int layer, const RowRange& range) const {
  const DecoderBuffers& b = buffers_;
  const int64_t query_columns = static_cast<int64_t>(spec().num_heads) * spec().head_dim;
  const int plan = plan_of_layer_[layer];
  Tensor work;
  if (b.attention_work) work = b.attention_work.select(0, plan).select(0, range.segment_begin);
  std::vector<Op> ops;
  if (layer == plan_layers_[plan] && work) {
    ops.push_back(PlanAttention{.tables = b.attention,
                                .segment_begin = range.segment_begin,
                                .segment_end = range.segment_end,
                                .num_heads = spec().num_heads,
                                .num_kv_heads = spec().num_kv_heads,
                                .head_dim = spec().head_dim,
                                .window = spec().window(layer),
                                .work = work,
                                .rows = kv_rows(layer, range)});
  }
  ops.push_back(Attention{.q = b.qkv.slice_columns(0, query_columns),
                          .out = b.attention_out,
                          .k_cache = b.k_cache[layer],
                          .v_cache = b.v_cache[layer],
                          .tables = b.attention,
                          .segment_begin = range.segment_begin,
                          .segment_end = range.segment_end,
                          .scale = spec().attention_scale > 0
                                       ? spec().attention_scale
                                       : 1.0f / std::sqrt(static_cast<float>(spec().head_dim)),
                          .window = spec().window(layer),
                          .work = work,
                          .rows = kv_rows(layer, range)});
  return ops;
}

std::vector<Op> Decoder::emit_o(int layer, const RowRange& range) const {
  const Weights::Layer w = weights_->layer(layer);
  std::vector<Op> ops;
  add_to_residual(ops, rows(buffers_.attention_out, range), w.o, w.o_norm, w.post_norm, range);
  return ops;
}

std::vector<Op> Decoder::emit_gathered_o(int layer, const RowRange& range) const {
  const Weights::Layer w = weights_->layer(layer);
  NF_CHECK(w.o_columns, "a schedule that gathers attention outputs needs weights made for it");
  const Tensor gathered = rows(buffers_.gathered, range), normed = rows(buffers_.normed, range);
  const Tensor residual = rows(buffers_.residual, range), out = w.o_norm ? normed : residual;
  const int64_t share = w.o_columns.size(0);
  const Tensor own = out.slice_columns(spec().rank * share, (spec().rank + 1) * share);
  std::vector<Op> ops{
      AllGather{
          .x = rows(buffers_.attention_out, range), .out = gathered, .work = buffers_.gather_work},
      Gemm{.x = gathered, .weight = w.o_columns, .out = own, .accumulate = !w.o_norm},
      AllGather{.x = own, .out = out, .work = buffers_.gather_work}};
  if (w.o_norm) ops.push_back(norm_and_add(normed, w.o_norm, residual));
  if (norms_sums_) ops.push_back(norm(residual, w.post_norm, normed));
  return ops;
}

std::vector<Op> Decoder::emit_mlp(int layer, const RowRange& range) const {
  if (spec().has_experts()) return emit_experts(layer, range);
  const DecoderBuffers& b = buffers_;
  const Weights::Layer w = weights_->layer(layer);
  std::vector<Op> ops;
  if (!norms_sums_) {
    ops.push_back(norm(rows(b.residual, range), w.post_norm, rows(b.normed, range)));
  }
  ops.push_back(GemmSiluMul{.x = rows(b.normed, range),
                            .weight = w.gate_up,
                            .out = rows(b.activated, range),
                            .activation = spec().activation});
  add_to_residual(ops, rows(b.activated, range), w.down, w.down_norm, next_norm(layer), range);
  return ops;
}

RmsNorm Decoder::norm(const Tensor& x, const Tensor& weight, const Tensor& out) const {
  return {.x = x,
          .out = out,
          .weight = weight,
          .eps = spec().rms_norm_eps,
          .unit_offset = spec().norm_unit_offset};
}

RmsNorm Decoder::norm_and_add(const Tensor& x, const Tensor& weight, const Tensor& out) const {
  RmsNorm add = norm(x, weight, out);
  add.accumulate = true;
  return add;
}

Tensor Decoder::next_norm(int layer) const {
  return layer + 1 < spec().num_layers ? weights_->layer(layer + 1).input_norm : Tensor();
}

AllReduce Decoder::sum_residual(const RowRange& range, const Tensor& next_norm) const {
  AllReduce sum{.x = rows(buffers_.residual, range)};
  if (norms_sums_ && next_norm) sum.norm = norm(sum.x, next_norm, rows(buffers_.normed, range));
  return sum;
}

void Decoder::add_to_residual(std::vector<Op>& ops, const Tensor& x, const Tensor& weight,
                              const Tensor& post_norm, const Tensor& next_norm,
                              const RowRange& range) const {
  const Tensor residual = rows(buffers_.residual, range), normed = rows(buffers_.normed, range);
  const Tensor out = post_norm ? normed : residual;
  const bool accumulates = !post_norm && spec().rank == 0;
  ops.push_back(Gemm{.x = x, .weight = weight, .out = out, .accumulate = accumulates});
  if (spec().ranks > 1) {
    ops.push_back(post_norm ? AllReduce{.x = out} : sum_residual(range, next_norm));
  }
  if (post_norm) ops.push_back(norm_and_add(normed, post_norm, residual));
}

std::vector<Op> Decoder::emit_logits(int samples) const {
  const Tensor x = buffers_.head_normed.slice_rows(0, samples);
  const Tensor logits = buffers_.logits.slice_rows(0, samples);
  const Tensor weight = weights_->lm_head();
  if (spec().ranks == 1) return {Gemm{.x = x, .weight = weight, .out = logits}};
  const Tensor own = buffers_.own_logits.slice_rows(0, samples);
  return {Gemm{.x = x, .weight = weight, .out = own.slice_columns(0, weight.size(0))},
          AllGather{.x = own, .out = logits, .work = buffers_.gather_work}};
}

std::vector<Op> Decoder::emit_experts(int layer, const RowRange& range) const {
  const DecoderBuffers& b = buffers_;
  const ExpertBuffers& e = b.experts;
  const Weights::Layer w = weights_->layer(layer);
  const auto pairs = [&](const Tensor& tensor) {
    const int64_t active = spec().experts_per_token;
    return tensor.slice_rows(range.row_begin * active, range.row_end * active);
  };
  const Tensor offsets = e.offsets.select(0, range.segment_begin);
  const Tensor residual = rows(b.residual, range);
  std::vector<Op> ops = {
      Gemm{.x = rows(b.normed, range), .weight = w.router, .out = rows(e.logits, range)},
      RouteExperts{.logits = rows(e.logits, range),
                   .experts = rows(e.chosen, range),
                   .weights = rows(e.weights, range),
                   .renormalize = spec().norm_topk_prob},
      SortByExpert{.experts = rows(e.chosen, range),
                   .offsets = offsets,
                   .sources = pairs(e.sources),
                   .places = rows(e.places, range)},
      GatherRows{.x = rows(b.normed, range), .index = pairs(e.sources), .out = pairs(e.values)},
      GroupedGemmSiluMul{
          .x = pairs(e.values), .weight = w.gate_up, .offsets = offsets, .out = pairs(b.activated)},
      GroupedGemm{
          .x = pairs(b.activated), .weight = w.down, .offsets = offsets, .out = pairs(e.values)},
      CombineExperts{.x = pairs(e.values),
                     .places = rows(e.places, range),
                     .weights = rows(e.weights, range),
                     .out = residual,
                     .accumulate = spec().rank == 0}};
  if (!norms_sums_) ops.insert(ops.begin(), norm(residual, w.post_norm, rows(b.normed, range)));
  if (spec().ranks > 1) ops.push_back(sum_residual(range, next_norm(layer)));
  return ops;
}

std::vector<Op> Decoder::emit_head(int samples, const HeadOptions& options) const {
  if (samples == 0) return {};
  const DecoderBuffers& b = buffers_;
  const auto first = [samples](const Tensor& tensor) { return tensor.slice_rows(0, samples); };
  std::vector<Op> ops;
  ops.push_back(
      GatherRows{.x = b.residual, .index = first(b.sample_rows), .out = first(b.head_residual)});
  ops.push_back(norm(first(b.head_residual), weights_->norm(), first(b.head_normed)));
  const std::vector<Op> logits = emit_logits(samples);
  ops.insert(ops.end(), logits.begin(), logits.end());
  if (options.bias) {
    ops.push_back(AddBias{.logits = first(b.logits),
                          .indptr = b.bias.indptr.slice_rows(0, samples + 1),
                          .tokens = b.bias.tokens,
                          .values = b.bias.values});
  }
  if (options.penalties) {
    ops.push_back(Penalize{.logits = first(b.logits),
                           .history = b.history,
                           .tables = {.slots = first(b.sampling.slots),
                                      .length = first(b.penalties.length),
                                      .generated = first(b.sampling.counter),
                                      .presence = first(b.penalties.presence),
                                      .frequency = first(b.penalties.frequency),
                                      .repetition = first(b.penalties.repetition)}});
  }
  if (options.masks) {
    ops.push_back(MaskLogits{
        .logits = first(b.logits), .mask_rows = first(b.masks.rows), .masks = b.masks.masks});
  }
  ops.push_back(
      Sample{.logits = first(b.logits),
             .tables = {.slots = first(b.sampling.slots),
                        .temperature = first(b.sampling.temperature),
                        .top_p = first(b.sampling.top_p),
                        .min_p = first(b.sampling.min_p),
                        .top_k = first(b.sampling.top_k),
                        .seed = first(b.sampling.seed),
                        .counter = first(b.sampling.counter),
                        .banned_indptr = b.sampling.banned_indptr.slice_rows(0, samples + 1),
                        .banned = b.sampling.banned},
             .token_pool = b.token_pool,
             .sampled = first(b.sampled)});
  if (options.penalties) {
    ops.push_back(RecordSamples{.sampled = first(b.sampled),
                                .slots = first(b.sampling.slots),
                                .length = first(b.penalties.length),
                                .history = b.history});
  }
  if (options.logprobs && options.logits_again) {
    ops.insert(ops.end(), logits.begin(), logits.end());
  }
  if (options.logprobs) {
    ops.push_back(Logprobs{.logits = first(b.logits),
                           .sampled = first(b.sampled),
                           .targets = first(b.logprob_targets),
                           .counts = first(b.logprob_counts),
                           .top = first(b.top),
                           .logprobs = first(b.logprobs),
                           .ranks = first(b.ranks)});
  }
  return ops;
}

std::vector<float> rope_table(const std::vector<float>& inv_freq, float attention_factor,
                              int positions) {
  const size_t half = inv_freq.size();
  std::vector<float> table(static_cast<size_t>(positions) * 2 * half);
  for (int position = 0; position < positions; ++position) {
    float* row = table.data() + static_cast<size_t>(position) * 2 * half;
    for (size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * inv_freq[i];
      row[i] = std::cos(angle) * attention_factor;
      row[half + i] = std::sin(angle) * attention_factor;
    }
  }
  return table;
}

}  // namespace nanoflow
