#include "pipeline/engine.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "bindings/register.h"

namespace py = pybind11;

namespace nanoflow {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::vector<T> to_vector(const Array<T>& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

template <typename T>
Array<T> to_array(const std::vector<T>& values, std::vector<py::ssize_t> shape) {
  Array<T> array(std::move(shape));
  std::memcpy(array.mutable_data(), values.data(), values.size() * sizeof(T));
  return array;
}

using Ints = Array<int32_t>;
using Floats = Array<float>;

Batch make_batch(const Ints& tokens, const Ints& positions, const Ints& request_indptr,
                 const Ints& kv_len, const Ints& page_indptr, const Ints& page_indices,
                 const Ints& segment_requests, const Ints& sample_rows, const Ints& slots,
                 const Floats& temperature, const Floats& top_p, const Floats& min_p,
                 const Ints& top_k, const Array<uint64_t>& seed, const Ints& counter,
                 const Ints& banned_indptr, const Ints& banned, bool want_logits,
                 bool want_timings) {
  return {.tokens = to_vector(tokens),
          .positions = to_vector(positions),
          .request_indptr = to_vector(request_indptr),
          .kv_len = to_vector(kv_len),
          .page_indptr = to_vector(page_indptr),
          .page_indices = to_vector(page_indices),
          .segment_requests = to_vector(segment_requests),
          .sample_rows = to_vector(sample_rows),
          .slots = to_vector(slots),
          .temperature = to_vector(temperature),
          .top_p = to_vector(top_p),
          .min_p = to_vector(min_p),
          .top_k = to_vector(top_k),
          .seed = to_vector(seed),
          .counter = to_vector(counter),
          .banned_indptr = to_vector(banned_indptr),
          .banned = to_vector(banned),
          .want_logits = want_logits,
          .want_timings = want_timings};
}

void register_config(py::module_& m) {
  const EngineConfig defaults;
  py::class_<EngineConfig>(m, "EngineConfig", "Capacities of an engine.")
      .def(py::init([](int max_num_batched_tokens, int max_num_seqs, int max_model_len,
                       int page_size, int num_pages, int row_granularity, int jitter_us,
                       bool enforce_eager) {
             return EngineConfig{.max_num_batched_tokens = max_num_batched_tokens,
                                 .max_num_seqs = max_num_seqs,
                                 .max_model_len = max_model_len,
                                 .page_size = page_size,
                                 .num_pages = num_pages,
                                 .row_granularity = row_granularity,
                                 .jitter_us = jitter_us,
                                 .enforce_eager = enforce_eager};
           }),
           py::kw_only(), py::arg("max_num_batched_tokens") = defaults.max_num_batched_tokens,
           py::arg("max_num_seqs") = defaults.max_num_seqs,
           py::arg("max_model_len") = defaults.max_model_len,
           py::arg("page_size") = defaults.page_size, py::arg("num_pages"),
           py::arg("row_granularity") = defaults.row_granularity,
           py::arg("jitter_us") = defaults.jitter_us,
           py::arg("enforce_eager") = defaults.enforce_eager)
      .def_readonly("max_num_batched_tokens", &EngineConfig::max_num_batched_tokens)
      .def_readonly("max_num_seqs", &EngineConfig::max_num_seqs)
      .def_readonly("max_model_len", &EngineConfig::max_model_len)
      .def_readonly("page_size", &EngineConfig::page_size)
      .def_readonly("num_pages", &EngineConfig::num_pages)
      .def_readonly("enforce_eager", &EngineConfig::enforce_eager);
}

void register_graph_stats(py::module_& m) {
  py::class_<GraphStats>(m, "GraphStats", "Graphs that replay steps.")
      .def_readonly("count", &GraphStats::count, "Alive.")
      .def_readonly("bytes", &GraphStats::bytes, "Device memory they take.")
      .def_readonly("seconds", &GraphStats::seconds, "Spent capturing since the engine was made.");
}

void register_step(py::module_& m) {
  py::class_<Batch>(m, "Batch", "One ragged step; the arrays are copied. See pipeline/batch.h.")
      .def(py::init(&make_batch), py::kw_only(), py::arg("tokens"), py::arg("positions"),
           py::arg("request_indptr"), py::arg("kv_len"), py::arg("page_indptr"),
           py::arg("page_indices"), py::arg("segment_requests"), py::arg("sample_rows"),
           py::arg("slots"), py::arg("temperature"), py::arg("top_p"), py::arg("min_p"),
           py::arg("top_k"), py::arg("seed"), py::arg("counter"), py::arg("banned_indptr"),
           py::arg("banned"), py::arg("want_logits") = false, py::arg("want_timings") = false);
  py::class_<OpTiming>(m, "OpTiming", "When one op of a step ran, from the step's start.")
      .def_readonly("name", &OpTiming::name)
      .def_readonly("lane", &OpTiming::lane)
      .def_readonly("begin_us", &OpTiming::begin_us)
      .def_readonly("end_us", &OpTiming::end_us);
  py::class_<StepResult>(m, "StepResult")
      .def_property_readonly("tokens",
                             [](const StepResult& result) {
                               return to_array(result.tokens,
                                               {static_cast<py::ssize_t>(result.tokens.size())});
                             })
      .def_property_readonly(
          "logits",
          [](const StepResult& result) -> std::optional<Floats> {
            if (result.logits.empty()) return std::nullopt;
            const auto samples = static_cast<py::ssize_t>(result.tokens.size());
            const auto values = static_cast<py::ssize_t>(result.logits.size());
            return to_array(result.logits, {samples, values / samples});
          },
          "[S, V] float32 when the batch asked for them.")
      .def_readonly("timings", &StepResult::timings, "When the batch asked for them.")
      .def_readonly("begin_us", &StepResult::begin_us,
                    "When the step's first op began, by a clock that all steps share; where the "
                    "batch asked for timings.");
  py::class_<StepHandle>(m, "StepHandle", "A step on its way.")
      .def_property_readonly("step", &StepHandle::step, "Its number, from 1.")
      .def("is_done", &StepHandle::is_done)
      .def("wait", &StepHandle::wait, py::return_value_policy::copy,
           py::call_guard<py::gil_scoped_release>(),
           "Blocks until the step has left the device; raises what made it fail.");
}

}  // namespace

void register_engine(py::module_& m) {
  register_config(m);
  register_graph_stats(m);
  register_step(m);
  py::class_<Engine>(m, "Engine", "The model on one device: steps in, sampled tokens out.")
      .def(py::init<const EngineConfig&, std::shared_ptr<Weights>, const Schedule&>(),
           py::arg("config"), py::arg("weights"), py::arg("schedule"),
           py::call_guard<py::gil_scoped_release>())
      .def("submit", &Engine::submit, py::arg("batch"), py::call_guard<py::gil_scoped_release>(),
           "Queues a step and returns at once. Raises EngineError on a bad batch and while two "
           "steps "
           "are in flight.")
      .def_property_readonly("completed_steps", &Engine::completed_steps)
      .def("set_schedule", &Engine::set_schedule, py::arg("schedule"), "From the next step on.")
      .def_property_readonly("schedule", &Engine::schedule)
      .def_property_readonly("config", &Engine::config)
      .def(
          "plans",
          [](const Engine& engine, const std::vector<int>& segment_rows, int samples) {
            std::vector<std::shared_ptr<Plan>> plans;
            for (const auto& plan : engine.plans(engine.schedule(), segment_rows, samples)) {
              plans.push_back(std::const_pointer_cast<Plan>(plan));
            }
            return plans;
          },
          py::arg("segment_rows"), py::arg("samples"),
          "The plans of a step whose segments hold these rows, in the order they run: layers, "
          "head.")
      .def("graph_stats", &Engine::graph_stats);
}

}  // namespace nanoflow
