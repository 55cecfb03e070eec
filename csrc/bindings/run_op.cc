#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/array.h"
#include "bindings/mirror.h"
#include "bindings/register.h"
#include "kernels/backend.h"

namespace py = pybind11;

namespace nanoflow {
namespace {

/// The keyword arguments of run_op; remembers which have been asked for. Tensors are the arrays'
/// own memory, or its copy in `mirror` where there is one.
class Operands {
 public:
  Operands(std::string_view op, const py::kwargs& values, Mirror* mirror)
      : op_(op), values_(values), mirror_(mirror) {}

  Tensor in(const char* name) {
    const Tensor tensor = as_tensor(array(name));
    return mirror_ == nullptr ? tensor : mirror_->of(tensor);
  }
  Tensor in_or_none(const char* name) { return values_.contains(name) ? in(name) : Tensor(); }
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
  return CombineExperts{
      .x = a.in("x"), .places = a.in("places"), .weights = a.in("weights"), .out = a.out("out")};
}

Op make_all_reduce(Operands& a) { return AllReduce{.x = a.out("x")}; }

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

std::vector<Tensor> tensors_of(const py::kwargs& values) {
  std::vector<Tensor> tensors;
  for (const auto& [name, value] : values) {
    if (!py::isinstance<py::array>(value)) continue;
    tensors.push_back(as_tensor(py::reinterpret_borrow<py::array>(value)));
  }
  return tensors;
}

/// Where a kernel works: so many bytes in whole words, in memory that `owner` gets.
Tensor make_work(size_t bytes, Backend& backend, Buffer& owner) {
  const int64_t words = elements_for(DType::kI32, bytes);
  owner = backend.allocate(static_cast<size_t>(words) * size_of(DType::kI32));
  return Tensor(owner.data(), DType::kI32, backend.device(), {words});
}

/// Enqueues the op and, before an attention on a backend that wants one, its plan; returns the
/// memory they work in.
Buffer enqueue(Op& op, Backend& backend, Lane& lane) {
  Buffer work;
  if (auto* attention = std::get_if<Attention>(&op)) {
    const auto D = static_cast<int>(attention->k_cache.size(3));
    PlanAttention plan{.tables = attention->tables,
                       .segment_begin = attention->segment_begin,
                       .segment_end = attention->segment_end,
                       .num_heads = static_cast<int>(attention->q.size(1)) / D,
                       .num_kv_heads = static_cast<int>(attention->k_cache.size(1)),
                       .window = attention->window,
                       .work = {},
                       .rows = attention->rows};
    const size_t bytes = backend.attention_work_bytes(static_cast<int>(plan.tables.kv_len.size(0)),
                                                      static_cast<int>(attention->q.size(0)),
                                                      plan.num_heads, plan.num_kv_heads);
    if (bytes > 0) {
      plan.work = attention->work = make_work(bytes, backend, work);
      backend.kernels().run(plan, lane);
    }
  }
  if (auto* gather = std::get_if<AllGather>(&op)) {
    const size_t bytes = backend.communicator().gather_work_bytes(
        static_cast<size_t>(gather->x.numel()) * size_of(gather->x.dtype()));
    if (bytes > 0) gather->work = make_work(bytes, backend, work);
  }
  std::visit([&](const auto& o) { backend.kernels().run(o, lane); }, op);
  return work;
}

/// An op over NumPy arrays, or over their copies on a GPU, and a lane to run it on.
struct Bench {
  Bench(const std::string& name, const std::shared_ptr<Backend>& backend, int width,
        const py::kwargs& values)
      : lane(backend->make_lane(width > 0 ? width : backend->width())),
        op(make_op(name, values, nullptr)) {
    if (backend->device().kind == Device::Kind::kCpu) return;
    mirror.emplace(*backend, *lane, tensors_of(values));
    op = make_op(name, values, &*mirror);
  }

  std::unique_ptr<Lane> lane;
  std::optional<Mirror> mirror;
  Op op;
};

void run_op(const std::string& name, const std::shared_ptr<Backend>& backend, int width,
            const py::kwargs& values) {
  const auto done = backend->make_event();
  Bench bench(name, backend, width, values);
  py::gil_scoped_release release;
  const Buffer work = enqueue(bench.op, *backend, *bench.lane);
  if (bench.mirror) bench.mirror->copy_back();
  bench.lane->record(*done);
  done->synchronize();
}

/// Runs the op over and over, at most two batches of runs ahead of the device, and returns the
/// microseconds of a run in the second half of the time.
double time_op(const std::string& name, const std::shared_ptr<Backend>& backend, double seconds,
               int width, const py::kwargs& values) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::duration<double> kBatch{0.02};
  Bench bench(name, backend, width, values);
  py::gil_scoped_release release;
  const Buffer work = enqueue(bench.op, *backend, *bench.lane);
  const std::unique_ptr<Event> done[] = {backend->make_event(), backend->make_event()};
  const auto enqueue_runs = [&](int runs, Event& event) {
    for (int i = 0; i < runs; ++i) {
      std::visit([&](const auto& op) { backend->kernels().run(op, *bench.lane); }, bench.op);
    }
    bench.lane->record(event);
  };
  enqueue_runs(1, *done[0]);
  done[0]->synchronize();
  auto begin = Clock::now();
  enqueue_runs(1, *done[0]);
  done[0]->synchronize();
  const int runs = std::max(1, static_cast<int>(kBatch / (Clock::now() - begin)));
  begin = Clock::now();
  const auto half = begin + std::chrono::duration_cast<Clock::duration>(
                                std::chrono::duration<double>(seconds / 2));
  enqueue_runs(runs, *done[0]);
  auto counted_from = begin;
  int64_t counted = 0;
  for (int batch = 1;; ++batch) {
    enqueue_runs(runs, *done[batch % 2]);
    done[(batch - 1) % 2]->synchronize();
    const auto now = Clock::now();
    if (now < half) {
      counted_from = now;
      continue;
    }
    counted += runs;
    if (now - begin >= std::chrono::duration<double>(seconds)) {
      done[batch % 2]->synchronize();
      return std::chrono::duration<double, std::micro>(now - counted_from).count() / counted;
    }
  }
}

}  // namespace

void register_run_op(py::module_& m) {
  m.def("run_op", &run_op, py::arg("name"), py::arg("backend"), py::arg("width") = 0,
        "Runs one op on NumPy arrays in place, on a lane of `width` threads or SMs (0: the "
        "backend's); a GPU works on copies of them. "
        "The keywords are the fields of the op's struct in kernels/ops.h, those of its tables "
        "among them; uint16 arrays are bfloat16. Raises TypeError for missing or unknown "
        "operands, EngineError for what the op refuses.");
  m.def("time_op", &time_op, py::arg("name"), py::arg("backend"), py::arg("seconds"),
        py::arg("width") = 0,
        "Microseconds of a run of an op that is repeated for so many seconds, the first half of "
        "them dropped: what it takes under sustained load. Operands and errors as run_op; the "
        "arrays are overwritten on the CPU and left alone by a GPU.");
}

}  // namespace nanoflow
