#include "bindings/register.h"
#include "core/error.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "nanoflow's engine: what runs on the device, one step at a time.";
  const auto& error =
      pybind11::register_exception<nanoflow::Error>(m, "EngineError", PyExc_RuntimeError);
  pybind11::register_exception<nanoflow::OutOfMemory>(m, "OutOfMemoryError", error);
  nanoflow::register_backend(m);
  nanoflow::register_model(m);
  nanoflow::register_schedule(m);
  nanoflow::register_step(m);
  nanoflow::register_engine(m);
  nanoflow::register_run_op(m);
  nanoflow::register_costs(m);
}
