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
      .def_property_readonly("free_memory", &Backend::free_memory, "Bytes.");
  m.def("cpu_isas", &cpu_isas,
        "Instruction sets this machine can run, slowest first; the last is what 'auto' takes.");
}

}  // namespace nanoflow
