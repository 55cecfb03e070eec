#include "bindings/make_op.h"

#include <pybind11/stl.h>

#include <set>
#include <string_view>
#include <utility>

#include "bindings/array.h"

namespace py = pybind11;

namespace nanoflow {
namespace {

/// The keyword arguments; remembers which have been asked for. Tensors are the arrays'
/// own memory, or its copy in `mirror` where there is one.
class Operands {
 public:
  Operands(std::string_view op, const py::kwargs& values, Mirror* mirror)
      : op_(op), values_(values), mirror_(mirror) {}

  Tensor in(const char* name) {
    const Tensor tensor = as_tensor(array(name));
    return mirror_ == nullptr ? tensor : mirror_->of(tensor);
  }
  bool has(const char* name) const { return values_.contains(name); }
  Tensor in_or_none(const char* name) { return has(name) ? in(name) : Tensor(); }
  Tensor out(const char* name) {
    const py::array found = array(name);
    if (!found.writeable()) throw py::value_error(op_ + ": " + name + " is read-only");
    const Tensor tensor = as_tensor(found);
    return mirror_ == nullptr ? tensor : mirror_->written(tensor);
  }
  template <typename T>
  T scalar(const char* name) {
    return value(name).cast<T>();
  }

  template <typename T>
  T scalar_or(const char* name, T otherwise) {
    return values_.contains(name) ? scalar<T>(name) : otherwise;
  }

  /// Raises for arguments that the op does not have.
  void check_all_used() const {
    for (const auto& [name, value] : values_) {
      const auto text = name.cast<std::string>();
      if (!used_.contains(text)) throw py::type_error(op_ + " has no operand '" + text + "'");
    }
  }

 private:
  py::object value(const char* name) {
    used_.insert(name);
    if (!values_.contains(name)) throw py::type_error(op_ + " lacks operand '" + name + "'");
    return values_[name];
  }
  py::array array(const char* name) {
    py::object found = value(name);
    if (!py::isinstance<py::array>(found)) {
      throw py::type_error(op_ + ": " + name + " is no NumPy array");
    }
    return py::reinterpret_borrow<py::array>(found);
  }

  std::string op_;
  const py::kwargs& values_;
  Mirror* mirror_;
  std::set<std::string> used_;
};

/// All rows of the step.
KvRows all_rows(const Tensor& tensor) { return {.layer = 0, .begin = 0, .end = tensor.size(0)}; }

Op make_embed(Operands& a) {
  return Embed{.tokens = a.in("tokens"),
               .token_pool = a.in("token_pool"),
               .table = a.in("table"),
               .out = a.out("out"),
               .scale = a.scalar_or("scale", 1.0f)};
}

Op make_rms_norm(Operands& a) {
  return RmsNorm{.x = a.in("x"),
                 .out = a.out("out"),
                 .weight = a.in("weight"),
                 .eps = a.scalar<float>("eps"),
                 .unit_offset = a.scalar_or("unit_offset", false),
                 .accumulate = a.scalar_or("accumulate", false)};
}

Op make_gemm(Operands& a) {
  return Gemm{.x = a.in("x"),
              .weight = a.in("weight"),
              .out = a.out("out"),
              .bias = a.in_or_none("bias"),
              .accumulate = a.scalar_or("accumulate", false)};
}

Op make_gemm_silu_mul(Operands& a) {
  return GemmSiluMul{
      .x = a.in("x"),
      .weight = a.in("weight"),
      .out = a.out("out"),
      .activation = parse_activation(a.scalar_or("activation", std::string("silu")))};
}

Op make_rope_append(Operands& a) {
  const Tensor qkv = a.out("qkv");
  return RopeAppend{.qkv = qkv,
                    .positions = a.in("positions"),
                    .kv_slots = a.in("kv_slots"),
                    .cos_sin = a.in("cos_sin"),
                    .k_cache = a.out("k_cache"),
                    .v_cache = a.out("v_cache"),
                    .q_norm = a.in_or_none("q_norm"),
                    .k_norm = a.in_or_none("k_norm"),
                    .norm_eps = a.scalar_or("norm_eps", 0.0f),
                    .norm_unit_offset = a.scalar_or("norm_unit_offset", false),
                    .rows = all_rows(qkv)};
}

Op make_attention(Operands& a) {
  const Tensor q = a.in("q");
  return Attention{.q = q,
                   .out = a.out("out"),
                   .k_cache = a.in("k_cache"),
                   .v_cache = a.in("v_cache"),
                   .tables = {.segment_requests = a.in("segment_requests"),
                              .row_begin = a.in("row_begin"),
                              .row_count = a.in("row_count"),
                              .kv_len = a.in("kv_len"),
                              .page_indptr = a.in("page_indptr"),
                              .page_indices = a.in("page_indices")},
                   .segment_begin = a.scalar<int>("segment_begin"),
                   .segment_end = a.scalar<int>("segment_end"),
                   .scale = a.scalar<float>("scale"),
                   .window = a.scalar_or("window", 0),
                   .work = {},
                   .rows = all_rows(q)};
}

Op make_gather_rows(Operands& a) {
  return GatherRows{.x = a.in("x"), .index = a.in("index"), .out = a.out("out")};
}

Op make_sample(Operands& a) {
  return Sample{.logits = a.out("logits"),
                .tables = {.slots = a.in("slots"),
                           .temperature = a.in("temperature"),
                           .top_p = a.in("top_p"),
                           .min_p = a.in("min_p"),
                           .top_k = a.in("top_k"),
                           .seed = a.in("seed"),
                           .counter = a.in("counter"),
                           .banned_indptr = a.in("banned_indptr"),
                           .banned = a.in("banned")},
                .token_pool = a.out("token_pool"),
                .sampled = a.out("sampled")};
}

Op make_fill_normal(Operands& a) {
  return FillNormal{.out = a.out("out"),
                    .seed = a.scalar<uint64_t>("seed"),
                    .mean = a.scalar<float>("mean"),
                    .std = a.scalar<float>("std"),
                    .first = a.scalar_or("first", uint64_t{0}),
                    .stride = a.scalar_or("stride", int64_t{0})};
}

Op make_penalize(Operands& a) {
  return Penalize{.logits = a.out("logits"),
                  .history = a.in("history"),
                  .tables = {.slots = a.in("slots"),
                             .length = a.in("length"),
                             .generated = a.in("generated"),
                             .presence = a.in("presence"),
                             .frequency = a.in("frequency"),
                             .repetition = a.in("repetition")}};
}

Op make_add_bias(Operands& a) {
  return AddBias{.logits = a.out("logits"),
                 .indptr = a.in("indptr"),
                 .tokens = a.in("tokens"),
                 .values = a.in("values")};
}

Op make_mask_logits(Operands& a) {
  return MaskLogits{
      .logits = a.out("logits"), .mask_rows = a.in("mask_rows"), .masks = a.in("masks")};
}

Op make_record_samples(Operands& a) {
  return RecordSamples{.sampled = a.in("sampled"),
                       .slots = a.in("slots"),
                       .length = a.in("length"),
                       .history = a.out("history")};
}

Op make_logprobs(Operands& a) {
  return Logprobs{.logits = a.in("logits"),
                  .sampled = a.in("sampled"),
                  .targets = a.in("targets"),
                  .counts = a.in("counts"),
                  .top = a.out("top"),
                  .logprobs = a.out("logprobs"),
                  .ranks = a.out("ranks")};
}

Op make_route_experts(Operands& a) {
  return RouteExperts{.logits = a.in("logits"),
                      .experts = a.out("experts"),
                      .weights = a.out("weights"),
                      .renormalize = a.scalar<bool>("renormalize")};
}

Op make_sort_by_expert(Operands& a) {
  return SortByExpert{.experts = a.in("experts"),
                      .offsets = a.out("offsets"),
                      .sources = a.out("sources"),
                      .places = a.out("places")};
}

template <typename Grouped>
Op make_grouped(Operands& a) {
  return Grouped{
      .x = a.in("x"), .weight = a.in("weight"), .offsets = a.in("offsets"), .out = a.out("out")};
}

Op make_combine_experts(Operands& a) {
  return CombineExperts{.x = a.in("x"),
                        .places = a.in("places"),
                        .weights = a.in("weights"),
                        .out = a.out("out"),
                        .accumulate = a.scalar_or("accumulate", false)};
}

Op make_all_reduce(Operands& a) {
  AllReduce op{.x = a.out("x")};
  if (!a.has("normed")) return op;
  op.norm = RmsNorm{.x = op.x,
                    .out = a.out("normed"),
                    .weight = a.in("norm_weight"),
                    .eps = a.scalar<float>("norm_eps"),
                    .unit_offset = a.scalar_or("norm_unit_offset", false)};
  return op;
}

Op make_all_gather(Operands& a) {
  return AllGather{.x = a.in("x"), .out = a.out("out"), .work = {}};
}

constexpr std::pair<std::string_view, Op (*)(Operands&)> kMakers[] = {
    {Embed::kName, make_embed},
    {RmsNorm::kName, make_rms_norm},
    {Gemm::kName, make_gemm},
    {GemmSiluMul::kName, make_gemm_silu_mul},
    {RopeAppend::kName, make_rope_append},
    {Attention::kName, make_attention},
    {GatherRows::kName, make_gather_rows},
    {Sample::kName, make_sample},
    {FillNormal::kName, make_fill_normal},
    {Penalize::kName, make_penalize},
    {AddBias::kName, make_add_bias},
    {MaskLogits::kName, make_mask_logits},
    {RecordSamples::kName, make_record_samples},
    {Logprobs::kName, make_logprobs},
    {RouteExperts::kName, make_route_experts},
    {SortByExpert::kName, make_sort_by_expert},
    {GroupedGemm::kName, make_grouped<GroupedGemm>},
    {GroupedGemmSiluMul::kName, make_grouped<GroupedGemmSiluMul>},
    {CombineExperts::kName, make_combine_experts},
    {AllReduce::kName, make_all_reduce},
    {AllGather::kName, make_all_gather},
};

}  // namespace

Op make_op(const std::string& name, const py::kwargs& values, Mirror* mirror) {
  for (const auto& [op, make] : kMakers) {
    if (op != name) continue;
    Operands operands(op, values, mirror);
    Op made = make(operands);
    operands.check_all_used();
    return made;
  }
  std::string known;
  for (const auto& [op, make] : kMakers) {
    if (!known.empty()) known += ", ";
    known += op;
  }
  throw py::value_error("there is no op '" + name + "'; there are " + known);
}

}  // namespace nanoflow
