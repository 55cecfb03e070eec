#include "kernels/ops.h"

#include "core/error.h"

namespace nanoflow {
namespace {

Region memory(const Tensor& tensor) {
  const auto begin = reinterpret_cast<uint64_t>(tensor.bytes());
  return {Region::kMemory, begin, begin + tensor.span_bytes()};
}

Region kv(const KvRows& rows) {
  return {rows.layer, static_cast<uint64_t>(rows.begin), static_cast<uint64_t>(rows.end)};
}

/// The rows of a whole-step tensor that an attention op touches.
Region rows_of(const Tensor& tensor, const KvRows& rows) {
  return memory(tensor.slice_rows(rows.begin, rows.end));
}

}  // namespace

std::string_view to_string(Activation activation) {
  return activation == Activation::kSilu ? "silu" : "gelu_tanh";
}

Activation parse_activation(std::string_view name) {
  for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    if (name == to_string(activation)) return activation;
  }
  fail("'", name, "' is no activation; there are silu and gelu_tanh");
}

Regions Embed::reads() const { return {memory(token_pool), memory(table)}; }
Regions Embed::writes() const { return {memory(out)}; }

Regions RmsNorm::reads() const {
  Regions regions = {memory(x), memory(weight)};
  if (accumulate) regions.push_back(memory(out));
  return regions;
}
Regions RmsNorm::writes() const { return {memory(out)}; }

Regions Gemm::reads() const {
  Regions regions = {memory(x), memory(weight)};
  if (bias) regions.push_back(memory(bias));
  if (accumulate) regions.push_back(memory(out));
  return regions;
}
Regions Gemm::writes() const { return {memory(out)}; }

Regions GemmSiluMul::reads() const { return {memory(x), memory(weight)}; }
Regions GemmSiluMul::writes() const { return {memory(out)}; }

Regions RopeAppend::reads() const {
  if (!q_norm) return {memory(qkv)};
  return {memory(qkv), memory(q_norm), memory(k_norm)};
}
Regions RopeAppend::writes() const { return {memory(qkv), kv(rows)}; }

Regions PlanAttention::reads() const { return {}; }
Regions PlanAttention::writes() const { return {memory(work)}; }

Regions Attention::reads() const {
  Regions regions = {rows_of(q, rows), kv(rows)};
  if (work) regions.push_back(memory(work));
  return regions;
}
Regions Attention::writes() const { return {rows_of(out, rows)}; }

Regions GatherRows::reads() const { return {memory(x)}; }
Regions GatherRows::writes() const { return {memory(out)}; }

Regions Sample::reads() const { return {memory(logits)}; }
Regions Sample::writes() const { return {memory(logits), memory(token_pool), memory(sampled)}; }

Regions FillNormal::reads() const { return {}; }
Regions FillNormal::writes() const { return {memory(out)}; }

Regions Penalize::reads() const { return {memory(logits), memory(history)}; }
Regions Penalize::writes() const { return {memory(logits)}; }

Regions AddBias::reads() const { return {memory(logits)}; }
Regions AddBias::writes() const { return {memory(logits)}; }

Regions MaskLogits::reads() const { return {memory(logits)}; }
Regions MaskLogits::writes() const { return {memory(logits)}; }

Regions RecordSamples::reads() const { return {memory(sampled)}; }
Regions RecordSamples::writes() const { return {memory(history)}; }

Regions Logprobs::reads() const { return {memory(logits), memory(sampled)}; }
Regions Logprobs::writes() const { return {memory(top), memory(logprobs), memory(ranks)}; }

Regions RouteExperts::reads() const { return {memory(logits)}; }
Regions RouteExperts::writes() const { return {memory(experts), memory(weights)}; }

Regions SortByExpert::reads() const { return {memory(experts)}; }
Regions SortByExpert::writes() const { return {memory(offsets), memory(sources), memory(places)}; }

Regions GroupedGemm::reads() const { return {memory(x), memory(weight), memory(offsets)}; }
Regions GroupedGemm::writes() const { return {memory(out)}; }

Regions GroupedGemmSiluMul::reads() const { return {memory(x), memory(weight), memory(offsets)}; }
Regions GroupedGemmSiluMul::writes() const { return {memory(out)}; }

Regions CombineExperts::reads() const {
  Regions regions = {memory(x), memory(places), memory(weights)};
  if (accumulate) regions.push_back(memory(out));
  return regions;
}
Regions CombineExperts::writes() const { return {memory(out)}; }

Regions AllReduce::reads() const {
  if (norm) return norm->reads();
  return {memory(x)};
}
Regions AllReduce::writes() const {
  if (norm) return {memory(x), memory(norm->out)};
  return {memory(x)};
}

Regions AllGather::reads() const { return {memory(x)}; }
Regions AllGather::writes() const {
  Regions regions = {memory(out)};
  if (work) regions.push_back(memory(work));
  return regions;
}

bool is_collective(const Op& op) {
  return std::holds_alternative<AllReduce>(op) || std::holds_alternative<AllGather>(op);
}

std::string_view name_of(const Op& op) {
  return std::visit([](const auto& o) { return o.kName; }, op);
}
Regions reads_of(const Op& op) {
  return std::visit([](const auto& o) { return o.reads(); }, op);
}
Regions writes_of(const Op& op) {
  return std::visit([](const auto& o) { return o.writes(); }, op);
}

}  // namespace nanoflow
