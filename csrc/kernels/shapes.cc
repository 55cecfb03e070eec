#include "kernels/shapes.h"

#include <cmath>

#include "core/error.h"
#include "core/match.h"

namespace nanoflow {

void check_shapes(const Embed& op) {
  ShapeMatcher match(Embed::kName);
  match("tokens", op.tokens, {"T"}).dtype(DType::kI32).contiguous_rows();
  match("token_pool", op.token_pool, {"slots"}).dtype(DType::kI32).contiguous_rows();
  match("table", op.table, {"V", "H"}).contiguous_rows();
  match("out", op.out, {"T", "H"}).dtype(op.table.dtype()).contiguous_rows();
}

void check_shapes(const RmsNorm& op) {
  const DType dtype = op.x.dtype();
  ShapeMatcher match(RmsNorm::kName);
  match("x", op.x, {"T", "H"}).contiguous_rows();
  match("out", op.out, {"T", "H"}).dtype(dtype).contiguous_rows();
  match("weight", op.weight, {"H"}).dtype(dtype).contiguous_rows();
}

void check_shapes(const Gemm& op) {
  const DType dtype = op.x.dtype();
  ShapeMatcher match(Gemm::kName);
  match("x", op.x, {"T", "K"}).contiguous_rows();
  match("weight", op.weight, {"N", "K"}).dtype(dtype).contiguous_rows();
  match("out", op.out, {"T", "N"}).contiguous_rows();
  if (op.bias) match("bias", op.bias, {"N"}).dtype(dtype).contiguous_rows();
  const bool adds = op.bias || op.accumulate;
  NF_CHECK(op.out.dtype() == dtype || (op.out.dtype() == DType::kF32 && !adds), "gemm: out is ",
           op.out, " but must be ", dtype, adds ? " where something is added" : " or float32");
  NF_CHECK(match["K"] > 0, "gemm: x is ", op.x, ", without a column");
}

void check_shapes(const GemmSiluMul& op) {
  const DType dtype = op.x.dtype();
  ShapeMatcher match(GemmSiluMul::kName);
  match("x", op.x, {"T", "K"}).contiguous_rows();
  match("weight", op.weight, {"2 I", "K"}).dtype(dtype).contiguous_rows();
  match("out", op.out, {"T", "I"}).dtype(dtype).contiguous_rows();
  NF_CHECK(match["2 I"] == 2 * match["I"], "gemm_silu_mul: weight is ", op.weight,
           " but needs twice the columns of out, ", op.out);
  NF_CHECK(match["I"] % GemmSiluMul::kGroup == 0, "gemm_silu_mul: out is ", op.out,
           " but its columns must be a multiple of ", GemmSiluMul::kGroup);
  NF_CHECK(match["K"] > 0, "gemm_silu_mul: x is ", op.x, ", without a column");
}

void check_shapes(const RopeAppend& op) {
  const DType dtype = op.qkv.dtype();
  ShapeMatcher match(RopeAppend::kName);
  match("qkv", op.qkv, {"T", "columns"}).contiguous_rows();
  match("positions", op.positions, {"T"}).dtype(DType::kI32).contiguous_rows();
  match("kv_slots", op.kv_slots, {"T"}).dtype(DType::kI32).contiguous_rows();
  match("cos_sin", op.cos_sin, {"max_positions", "D"}).dtype(DType::kF32).contiguous_rows();
  match("k_cache", op.k_cache, {"P", "Hkv", "page_size", "D"}).dtype(dtype).contiguous_rows();
  match("v_cache", op.v_cache, {"P", "Hkv", "page_size", "D"}).dtype(dtype).contiguous_rows();
  const int64_t D = match["D"];
  NF_CHECK(D % 2 == 0, "rope_append: head dim ", D, " is odd");
  NF_CHECK(match["columns"] % D == 0 && match["columns"] > 2 * match["Hkv"] * D,
           "rope_append: qkv is ", op.qkv, " but needs q heads, ", match["Hkv"], " k heads and ",
           match["Hkv"], " v heads of ", D);
  NF_CHECK(bool{op.q_norm} == bool{op.k_norm}, "rope_append: q_norm is ", op.q_norm, " and k_norm ",
           op.k_norm, "; both or none are given");
  if (!op.q_norm) return;
  match("q_norm", op.q_norm, {"D"}).dtype(dtype).contiguous_rows();
  match("k_norm", op.k_norm, {"D"}).dtype(dtype).contiguous_rows();
}

void check_shapes(const GatherRows& op) {
  ShapeMatcher match(GatherRows::kName);
  match("x", op.x, {"T", "H"}).contiguous_rows();
  match("index", op.index, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("out", op.out, {"S", "H"}).dtype(op.x.dtype()).contiguous_rows();
}

void check_shapes(const Sample& op) {
  ShapeMatcher match(Sample::kName);
  match("logits", op.logits, {"S", "V"}).dtype(DType::kF32).contiguous_rows();
  const auto table = [&](std::string_view name, const Tensor& tensor, std::string_view size,
                         DType dtype) {
    match(name, tensor, {size}).dtype(dtype).contiguous_rows();
  };
  const SamplingTables& tables = op.tables;
  table("slots", tables.slots, "S", DType::kI32);
  table("temperature", tables.temperature, "S", DType::kF32);
  table("top_p", tables.top_p, "S", DType::kF32);
  table("min_p", tables.min_p, "S", DType::kF32);
  table("top_k", tables.top_k, "S", DType::kI32);
  table("seed", tables.seed, "S", DType::kU64);
  table("counter", tables.counter, "S", DType::kI32);
  table("banned_indptr", tables.banned_indptr, "S + 1", DType::kI32);
  table("banned", tables.banned, "banned", DType::kI32);
  table("token_pool", op.token_pool, "slots", DType::kI32);
  table("sampled", op.sampled, "S", DType::kI32);
  NF_CHECK(match["S + 1"] == match["S"] + 1, "sample: banned_indptr is ", tables.banned_indptr,
           " for ", match["S"], " rows");
  NF_CHECK(match["V"] > 0, "sample: logits is ", op.logits, ", without a vocabulary");
}

void check_shapes(const FillNormal& op) {
  NF_CHECK(op.out.is_contiguous(), "fill_normal: out is ", op.out, ", not contiguous");
  NF_CHECK(op.stride == 0 || (op.out.dims() == 2 && op.stride >= op.out.size(1)),
           "fill_normal: stride is ", op.stride, " but out is ", op.out);
  NF_CHECK(std::isfinite(op.mean) && std::isfinite(op.std) && op.std >= 0, "fill_normal: mean is ",
           op.mean, " and std ", op.std, "; both must be finite, std at least 0");
}

void check_shapes(const Penalize& op) {
  ShapeMatcher match(Penalize::kName);
  const PenaltyTables& tables = op.tables;
  match("logits", op.logits, {"S", "V"}).dtype(DType::kF32).contiguous_rows();
  match("history", op.history, {"slots", "positions"}).dtype(DType::kI32).contiguous_rows();
  match("slots", tables.slots, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("length", tables.length, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("generated", tables.generated, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("presence", tables.presence, {"S"}).dtype(DType::kF32).contiguous_rows();
  match("frequency", tables.frequency, {"S"}).dtype(DType::kF32).contiguous_rows();
  match("repetition", tables.repetition, {"S"}).dtype(DType::kF32).contiguous_rows();
}

void check_shapes(const AddBias& op) {
  ShapeMatcher match(AddBias::kName);
  match("logits", op.logits, {"S", "V"}).dtype(DType::kF32).contiguous_rows();
  match("indptr", op.indptr, {"S + 1"}).dtype(DType::kI32).contiguous_rows();
  match("tokens", op.tokens, {"entries"}).dtype(DType::kI32).contiguous_rows();
  match("values", op.values, {"entries"}).dtype(DType::kF32).contiguous_rows();
  NF_CHECK(match["S + 1"] == match["S"] + 1, "add_bias: indptr is ", op.indptr, " for ", match["S"],
           " rows");
}

void check_shapes(const MaskLogits& op) {
  ShapeMatcher match(MaskLogits::kName);
  match("logits", op.logits, {"S", "V"}).dtype(DType::kF32).contiguous_rows();
  match("mask_rows", op.mask_rows, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("masks", op.masks, {"M", "V / 32"}).dtype(DType::kI32).contiguous_rows();
  NF_CHECK(match["V / 32"] == (match["V"] + 31) / 32, "mask_logits: masks is ", op.masks,
           " but a row needs a bit for each of ", match["V"], " tokens");
}

void check_shapes(const RecordSamples& op) {
  ShapeMatcher match(RecordSamples::kName);
  match("sampled", op.sampled, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("slots", op.slots, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("length", op.length, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("history", op.history, {"slots", "positions"}).dtype(DType::kI32).contiguous_rows();
}

void check_shapes(const Logprobs& op) {
  ShapeMatcher match(Logprobs::kName);
  match("logits", op.logits, {"S", "V"}).dtype(DType::kF32).contiguous_rows();
  match("sampled", op.sampled, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("targets", op.targets, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("counts", op.counts, {"S"}).dtype(DType::kI32).contiguous_rows();
  match("top", op.top, {"S", "top"}).dtype(DType::kI32).contiguous_rows();
  match("logprobs", op.logprobs, {"S", "1 + top"}).dtype(DType::kF32).contiguous_rows();
  match("ranks", op.ranks, {"S"}).dtype(DType::kI32).contiguous_rows();
  NF_CHECK(match["top"] == Logprobs::kMaxTop && match["1 + top"] == 1 + Logprobs::kMaxTop,
           "logprobs: top is ", op.top, " and logprobs ", op.logprobs, ", for the ",
           Logprobs::kMaxTop, " likeliest tokens");
}

void check_shapes(const RouteExperts& op) {
  ShapeMatcher match(RouteExperts::kName);
  match("logits", op.logits, {"T", "E"}).dtype(DType::kF32).contiguous_rows();
  match("experts", op.experts, {"T", "A"}).dtype(DType::kI32).contiguous_rows();
  match("weights", op.weights, {"T", "A"}).dtype(DType::kF32).contiguous_rows();
  NF_CHECK(match["A"] >= 1 && match["A"] <= match["E"], "route_experts: experts is ", op.experts,
           " but a row has 1 to ", match["E"], " experts");
}

void check_shapes(const SortByExpert& op) {
  ShapeMatcher match(SortByExpert::kName);
  match("experts", op.experts, {"T", "A"}).dtype(DType::kI32).contiguous_rows();
  match("offsets", op.offsets, {"E + 1"}).dtype(DType::kI32).contiguous_rows();
  match("sources", op.sources, {"T * A"}).dtype(DType::kI32).contiguous_rows();
  match("places", op.places, {"T", "A"}).dtype(DType::kI32).contiguous_rows();
  NF_CHECK(op.experts.is_contiguous() && op.places.is_contiguous(),
           "sort_by_expert: there are gaps between the rows of experts ", op.experts, " or places ",
           op.places);
  NF_CHECK(match["T * A"] == match["T"] * match["A"], "sort_by_expert: sources is ", op.sources,
           " but experts is ", op.experts);
  NF_CHECK(match["E + 1"] >= 2, "sort_by_expert: offsets is ", op.offsets, ", without an expert");
}

void check_shapes(const GroupedGemm& op) {
  const DType dtype = op.x.dtype();
  ShapeMatcher match(GroupedGemm::kName);
  match("x", op.x, {"S", "K"}).contiguous_rows();
  match("weight", op.weight, {"E", "N", "K"}).dtype(dtype).contiguous_rows();
  match("offsets", op.offsets, {"E + 1"}).dtype(DType::kI32).contiguous_rows();
  match("out", op.out, {"S", "N"}).dtype(dtype).contiguous_rows();
  NF_CHECK(match["E + 1"] == match["E"] + 1, "grouped_gemm: offsets is ", op.offsets,
           " for weight ", op.weight);
  NF_CHECK(match["K"] > 0, "grouped_gemm: x is ", op.x, ", without a column");
}

void check_shapes(const GroupedGemmSiluMul& op) {
  const DType dtype = op.x.dtype();
  ShapeMatcher match(GroupedGemmSiluMul::kName);
  match("x", op.x, {"S", "K"}).contiguous_rows();
  match("weight", op.weight, {"E", "2 I", "K"}).dtype(dtype).contiguous_rows();
  match("offsets", op.offsets, {"E + 1"}).dtype(DType::kI32).contiguous_rows();
  match("out", op.out, {"S", "I"}).dtype(dtype).contiguous_rows();
  NF_CHECK(match["E + 1"] == match["E"] + 1, "grouped_gemm_silu_mul: offsets is ", op.offsets,
           " for weight ", op.weight);
  NF_CHECK(match["2 I"] == 2 * match["I"] && match["I"] % GemmSiluMul::kGroup == 0,
           "grouped_gemm_silu_mul: weight is ", op.weight, " but needs twice the columns of out, ",
           op.out, ", which must be a multiple of ", GemmSiluMul::kGroup);
  NF_CHECK(match["K"] > 0, "grouped_gemm_silu_mul: x is ", op.x, ", without a column");
}

void check_shapes(const CombineExperts& op) {
  ShapeMatcher match(CombineExperts::kName);
  match("x", op.x, {"S", "H"}).contiguous_rows();
  match("places", op.places, {"T", "A"}).dtype(DType::kI32).contiguous_rows();
  match("weights", op.weights, {"T", "A"}).dtype(DType::kF32).contiguous_rows();
  match("out", op.out, {"T", "H"}).dtype(op.x.dtype()).contiguous_rows();
}

void check_shapes(const AllReduce& op, bool norms_sums) {
  ShapeMatcher match(AllReduce::kName);
  match("x", op.x, {"T", "N"}).contiguous_rows();
  NF_CHECK(op.x.is_contiguous(), "all_reduce: x is ", op.x, ", not contiguous");
  if (!op.norm) return;
  NF_CHECK(norms_sums, "all_reduce: this backend norms no sums; run rms_norm after it");
  check_shapes(*op.norm);
  NF_CHECK(op.norm->x.bytes() == op.x.bytes() && op.norm->x.size(0) == op.x.size(0) &&
               op.norm->x.size(1) == op.x.size(1),
           "all_reduce: x is ", op.x, " but its norm is of another tensor, ", op.norm->x);
  NF_CHECK(!op.norm->accumulate && op.norm->out.bytes() != op.x.bytes(),
           "all_reduce: a norm of what it sums needs an out of its own, to which it does not add");
}

void check_shapes(const AllGather& op, int ranks) {
  ShapeMatcher match(AllGather::kName);
  match("x", op.x, {"T", "C"}).contiguous_rows();
  match("out", op.out, {"T", "N"}).dtype(op.x.dtype()).contiguous_rows();
  NF_CHECK(match["N"] <= ranks * match["C"], "all_gather: out is ", op.out, " but ", ranks,
           " ranks have columns as in ", op.x);
}

}  // namespace nanoflow
