#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "bindings/register.h"
#include "pipeline/engine.h"

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

template <typename T>
Array<T> to_rows(const std::vector<T>& values, size_t rows) {
  return to_array(values,
                  {static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(values.size() / rows)});
}

using Ints = Array<int32_t>;
using Floats = Array<float>;

Batch make_batch(const Ints& tokens, const Ints& positions, const Ints& request_indptr,
                 const Ints& kv_len, const Ints& page_indptr, const Ints& page_indices,
                 const Ints& segment_requests, const Ints& sample_rows, const Ints& slots,
                 const Floats& temperature, const Floats& top_p, const Floats& min_p,
                 const Ints& top_k, const Array<uint64_t>& seed, const Ints& counter,
                 const Ints& banned_indptr, const Ints& banned, const Floats& presence_penalty,
                 const Floats& frequency_penalty, const Floats& repetition_penalty,
                 const Ints& history_indptr, const Ints& history_tokens, const Ints& bias_indptr,
                 const Ints& bias_tokens, const Floats& bias_values, const Ints& mask_rows,
                 const Ints& masks, const Ints& logprobs, const Ints& targets, bool want_logits,
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
          .presence_penalty = to_vector(presence_penalty),
          .frequency_penalty = to_vector(frequency_penalty),
          .repetition_penalty = to_vector(repetition_penalty),
          .history_indptr = to_vector(history_indptr),
          .history_tokens = to_vector(history_tokens),
          .bias_indptr = to_vector(bias_indptr),
          .bias_tokens = to_vector(bias_tokens),
          .bias_values = to_vector(bias_values),
          .mask_rows = to_vector(mask_rows),
          .masks = to_vector(masks),
          .logprobs = to_vector(logprobs),
          .targets = to_vector(targets),
          .want_logits = want_logits,
          .want_timings = want_timings};
}

}  // namespace

void register_step(py::module_& m) {
  py::class_<Batch>(m, "Batch", "One ragged step; the arrays are copied. See pipeline/batch.h.")
      .def(py::init(&make_batch), py::kw_only(), py::arg("tokens"), py::arg("positions"),
           py::arg("request_indptr"), py::arg("kv_len"), py::arg("page_indptr"),
           py::arg("page_indices"), py::arg("segment_requests"), py::arg("sample_rows"),
           py::arg("slots"), py::arg("temperature"), py::arg("top_p"), py::arg("min_p"),
           py::arg("top_k"), py::arg("seed"), py::arg("counter"), py::arg("banned_indptr"),
           py::arg("banned"), py::arg("presence_penalty") = Floats(),
           py::arg("frequency_penalty") = Floats(), py::arg("repetition_penalty") = Floats(),
           py::arg("history_indptr") = Ints(), py::arg("history_tokens") = Ints(),
           py::arg("bias_indptr") = Ints(), py::arg("bias_tokens") = Ints(),
           py::arg("bias_values") = Floats(), py::arg("mask_rows") = Ints(),
           py::arg("masks") = Ints(), py::arg("logprobs") = Ints(), py::arg("targets") = Ints(),
           py::arg("want_logits") = false, py::arg("want_timings") = false);
  py::class_<OpTiming>(m, "OpTiming", "When one op of a step ran, from the step's start.")
      .def_readonly("name", &OpTiming::name)
      .def_readonly("lane", &OpTiming::lane)
      .def_readonly("begin_us", &OpTiming::begin_us)
      .def_readonly("end_us", &OpTiming::end_us);
  py::class_<StepLogprobs>(m, "StepLogprobs",
                           "Log-probabilities of a step; see Logprobs in kernels/ops.h. Rows that "
                           "did not ask hold anything.")
      .def_property_readonly(
          "top",
          [](const StepLogprobs& result) { return to_rows(result.top, result.ranks.size()); },
          "[S, 20] int32: the likeliest tokens.")
      .def_property_readonly(
          "logprobs",
          [](const StepLogprobs& result) { return to_rows(result.logprobs, result.ranks.size()); },
          "[S, 21] float32: of the sampled token, then of `top`.")
      .def_property_readonly(
          "ranks",
          [](const StepLogprobs& result) {
            return to_array(result.ranks, {static_cast<py::ssize_t>(result.ranks.size())});
          },
          "[S] int32: of the sampled token, from 1.");
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
                    "batch asked for timings.")
      .def_property_readonly(
          "logprobs",
          [](const StepResult& result) -> std::optional<StepLogprobs> {
            if (result.logprobs.ranks.empty()) return std::nullopt;
            return result.logprobs;
          },
          "When the batch asked for them.");
  py::class_<StepHandle>(m, "StepHandle", "A step on its way.")
      .def_property_readonly("step", &StepHandle::step, "Its number, from 1.")
      .def("is_done", &StepHandle::is_done)
      .def("wait", &StepHandle::wait, py::return_value_policy::copy,
           py::call_guard<py::gil_scoped_release>(),
           "Blocks until the step has left the device; raises what made it fail.");
}

}  // namespace nanoflow
