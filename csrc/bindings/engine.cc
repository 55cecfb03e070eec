#include "pipeline/engine.h"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/register.h"

namespace py = pybind11;

namespace nanoflow {
namespace {

void register_config(py::module_& m) {
  const EngineConfig defaults;
  py::class_<EngineConfig>(m, "EngineConfig", "Capacities of an engine.")
      .def(py::init([](int max_num_batched_tokens, int max_num_seqs, int max_scored_rows,
                       int max_model_len, int page_size, int num_pages, int host_slots,
                       int row_granularity, int jitter_us, bool enforce_eager) {
             return EngineConfig{.max_num_batched_tokens = max_num_batched_tokens,
                                 .max_num_seqs = max_num_seqs,
                                 .max_scored_rows = max_scored_rows,
                                 .max_model_len = max_model_len,
                                 .page_size = page_size,
                                 .num_pages = num_pages,
                                 .host_slots = host_slots,
                                 .row_granularity = row_granularity,
                                 .jitter_us = jitter_us,
                                 .enforce_eager = enforce_eager};
           }),
           py::kw_only(), py::arg("max_num_batched_tokens") = defaults.max_num_batched_tokens,
           py::arg("max_num_seqs") = defaults.max_num_seqs,
           py::arg("max_scored_rows") = defaults.max_scored_rows,
           py::arg("max_model_len") = defaults.max_model_len,
           py::arg("page_size") = defaults.page_size, py::arg("num_pages") = defaults.num_pages,
           py::arg("host_slots") = defaults.host_slots,
           py::arg("row_granularity") = defaults.row_granularity,
           py::arg("jitter_us") = defaults.jitter_us,
           py::arg("enforce_eager") = defaults.enforce_eager)
      .def_readonly("max_num_batched_tokens", &EngineConfig::max_num_batched_tokens)
      .def_readonly("max_num_seqs", &EngineConfig::max_num_seqs)
      .def_readonly("max_scored_rows", &EngineConfig::max_scored_rows)
      .def_readonly("max_model_len", &EngineConfig::max_model_len)
      .def_readonly("page_size", &EngineConfig::page_size)
      .def_readonly("num_pages", &EngineConfig::num_pages)
      .def_readonly("host_slots", &EngineConfig::host_slots)
      .def_readonly("enforce_eager", &EngineConfig::enforce_eager);
}

void register_graph_stats(py::module_& m) {
  py::class_<GraphStats>(m, "GraphStats", "Graphs that replay steps.")
      .def_readonly("count", &GraphStats::count, "Alive.")
      .def_readonly("bytes", &GraphStats::bytes, "Device memory they take.")
      .def_readonly("seconds", &GraphStats::seconds, "Spent capturing since the engine was made.");
}

using Ints = py::array_t<int32_t, py::array::c_style>;

PageCopies page_copies(const Ints& pages, const Ints& slots) {
  return {.pages = {pages.data(), pages.data() + pages.size()},
          .slots = {slots.data(), slots.data() + slots.size()}};
}

CopyHandle copy_pages(Engine& engine, CopyDirection direction, const Ints& pages,
                      const Ints& slots) {
  PageCopies copies = page_copies(pages, slots);
  const py::gil_scoped_release release;
  return engine.copy_pages(direction, std::move(copies));
}

py::array_t<uint8_t> host_pool(const py::object& self) {
  const auto& engine = self.cast<const Engine&>();
  const auto slots = static_cast<py::ssize_t>(engine.config().host_slots);
  const auto bytes = static_cast<py::ssize_t>(engine.host_slot_bytes());
  // A view: the engine is its base, and lives as long.
  return py::array_t<uint8_t>({slots, bytes}, reinterpret_cast<uint8_t*>(engine.host_pool()), self);
}

void register_copies(py::module_& m) {
  py::class_<CopyHandle>(m, "CopyHandle", "Pages on their way to or from the host pool.")
      .def("is_done", &CopyHandle::is_done)
      .def("wait", &CopyHandle::wait, py::call_guard<py::gil_scoped_release>(),
           "Blocks until they are copied; the seconds that it took. Raises what made it fail.");
}

}  // namespace

void register_engine(py::module_& m) {
  register_config(m);
  register_graph_stats(m);
  register_copies(m);
  py::class_<Engine>(m, "Engine",
                     "The model on the devices of its ranks: steps in, sampled tokens out.")
      .def(py::init([](const EngineConfig& config,
                       std::variant<std::shared_ptr<Weights>, std::vector<std::shared_ptr<Weights>>>
                           weights,
                       const Schedule& schedule,
                       const std::optional<std::function<int()>>& choose_pages) {
             return std::visit(
                 [&](auto& own) {
                   return std::make_unique<Engine>(config, std::move(own), schedule,
                                                   choose_pages.value_or(nullptr));
                 },
                 weights);
           }),
           py::arg("config"), py::arg("weights"), py::arg("schedule"),
           py::arg("choose_pages") = py::none(), py::call_guard<py::gil_scoped_release>(),
           "Of the weights of one rank, or of all in order. With num_pages=0, `choose_pages` is "
           "called once all of rank 0 but its KV cache has its memory.")
      .def("submit", &Engine::submit, py::arg("batch"), py::call_guard<py::gil_scoped_release>(),
           "Queues a step and returns at once. Raises EngineError on a bad batch and while two "
           "steps "
           "are in flight.")
      .def(
          "store_pages",
          [](Engine& engine, const Ints& pages, const Ints& slots) {
            return copy_pages(engine, CopyDirection::kStore, pages, slots);
          },
          py::arg("pages"), py::arg("slots"),
          "Copies pages, as the steps submitted so far leave them, into slots of the host pool.")
      .def(
          "load_pages",
          [](Engine& engine, const Ints& pages, const Ints& slots) {
            return copy_pages(engine, CopyDirection::kLoad, pages, slots);
          },
          py::arg("pages"), py::arg("slots"),
          "Copies slots of the host pool into pages at once; later steps begin behind it.")
      .def("restart", &Engine::restart, py::call_guard<py::gil_scoped_release>(),
           "After a step has failed: lets steps be submitted again, from an empty KV cache. Raises "
           "EngineError when the device cannot be used any more.")
      .def(
          "sleep", &Engine::sleep, py::arg("discard_weights"),
          py::call_guard<py::gil_scoped_release>(),
          "Gives back the memory of the KV cache and of all buffers, and of the weights, which are "
          "kept on the host or discarded. Raises EngineError with steps in flight, with a host "
          "pool, and where the host has no room.")
      .def_property_readonly("is_asleep", &Engine::is_asleep)
      .def("wake_weights", &Engine::wake_weights, py::call_guard<py::gil_scoped_release>(),
           "Brings kept weights back; discarded ones are to be filled again. Raises "
           "OutOfMemoryError when a device has no room: to be tried again.")
      .def("wake_cache", &Engine::wake_cache, py::call_guard<py::gil_scoped_release>(),
           "Then, with an empty KV cache: steps may be submitted again. Errors as wake_weights.")
      .def_property_readonly("host_pool", &host_pool,
                             "uint8 [host_slots, bytes of a slot]: the pool itself.")
      .def_property_readonly("completed_steps", &Engine::completed_steps)
      .def("set_schedule", &Engine::set_schedule, py::arg("schedule"), "From the next step on.")
      .def_property_readonly("schedule", &Engine::schedule)
      .def_property_readonly("config", &Engine::config)
      .def_property_readonly("workspace_bytes", &Engine::workspace_bytes)
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
