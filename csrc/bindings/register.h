#pragma once

#include <pybind11/pybind11.h>

namespace nanoflow {

// One function a file of this folder; module.cc calls them all.
void register_backend(pybind11::module_& m);
void register_costs(pybind11::module_& m);
void register_model(pybind11::module_& m);
void register_schedule(pybind11::module_& m);
void register_step(pybind11::module_& m);
void register_engine(pybind11::module_& m);
void register_run_op(pybind11::module_& m);

}  // namespace nanoflow
