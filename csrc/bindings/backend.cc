#include "kernels/backend.h"

#include <pybind11/stl.h>

#include <sstream>

#include "bindings/register.h"

namespace py = pybind11;

namespace nanoflow {

void register_backend(py::module_& m) {
  py::class_<Backend, std::shared_ptr<Backend>>(
      m, "Backend", "Memory, lanes and kernels of one device; threads and isa are for the CPU.")
      .def(py::init([](const std::string& device, int threads, const std::string& isa) {
             return make_backend({.device = parse_device(device), .threads = threads, .isa = isa});
           }),
           py::arg("device") = "cpu", py::arg("threads") = 0, py::arg("isa") = "auto")
      .def_property_readonly("device",
                             [](const Backend& backend) {
                               std::ostringstream text;
                               text << backend.device();
                               return text.str();
                             })
      .def_property_readonly("description", &Backend::description)
      .def_property_readonly("width", &Backend::width, "Threads or SMs of the whole device.")
      .def_property_readonly("row_granularity", &Backend::row_granularity,
                             "Rows of a nano-batch are padded to multiples of it.")
      .def_property_readonly("total_memory", &Backend::total_memory, "Bytes of the device.")
      .def_property_readonly("free_memory", &Backend::free_memory, "Bytes that nobody uses.")
      .def(
          "model_problem",
          [](const Backend& backend, const std::string& dtype, int head_dim) {
            return backend.model_problem(parse_dtype(dtype), head_dim);
          },
          py::arg("dtype"), py::arg("head_dim"),
          "Why models of this dtype and head dim cannot run here; empty where they can.");
  m.def(
      "make_backends",
      [](const std::string& device, int ranks, int threads, const std::string& isa,
         const std::string& nccl_library, bool nccl_alone, int simulated_ranks,
         bool batch_invariant) {
        return make_backends({.device = parse_device(device),
                              .threads = threads,
                              .isa = isa,
                              .nccl_library = nccl_library,
                              .batch_invariant = batch_invariant,
                              .nccl_alone = nccl_alone,
                              .simulated_ranks = simulated_ranks},
                             ranks);
      },
      py::arg("device"), py::arg("ranks"), py::arg("threads") = 0, py::arg("isa") = "auto",
      py::arg("nccl_library") = "", py::arg("nccl_alone") = false, py::arg("simulated_ranks") = 0,
      py::arg("batch_invariant") = false, py::call_guard<py::gil_scoped_release>(),
      "The ranks of tensor parallelism, in order: a CPU's share its threads, GPUs are the device "
      "and those after it. `nccl_library` is the path of libnccl.so.2, which several GPUs need; "
      "`nccl_alone` has it used by one, too. `simulated_ranks`: rank 0 of so many without the "
      "others, to measure it. `batch_invariant`: a GPU computes for a row what depends on no "
      "other, as a CPU always does. Raises EngineError where there are fewer GPUs than ranks, or "
      "no NCCL.");
  m.def("cuda_problem", &cuda_problem, py::arg("index") = 0,
        py::call_guard<py::gil_scoped_release>(),
        "Why a CUDA device cannot be used, and what to do; empty where it can. Never raises.");
  m.def("cuda_bus_id", &cuda_bus_id, py::arg("index") = 0, py::call_guard<py::gil_scoped_release>(),
        "The PCI bus id of a CUDA device, by which other libraries know it whatever devices CUDA "
        "shows. Raises EngineError where there is no such device.");
  m.def("cpu_isas", &cpu_isas,
        "Instruction sets this machine can run, slowest first; the last is what 'auto' takes.");
}

}  // namespace nanoflow
