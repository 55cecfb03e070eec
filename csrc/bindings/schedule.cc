#include "pipeline/schedule.h"

#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <sstream>
#include <utility>
#include <variant>

#include "bindings/register.h"
#include "pipeline/plan.h"
#include "pipeline/validate.h"

namespace py = pybind11;

namespace nanoflow {
namespace {

using OneOrMore = std::variant<std::string, std::vector<std::string>>;

std::vector<std::string> lanes_of(const OneOrMore& lane) {
  const std::string* one = std::get_if<std::string>(&lane);
  if (one == nullptr) return std::get<std::vector<std::string>>(lane);
  return one->empty() ? std::vector<std::string>{} : std::vector<std::string>{*one};
}

}  // namespace

void register_schedule(py::module_& m) {
  py::class_<LaneSpec>(m, "LaneSpec", "A lane and its share of the device (threads or SMs).")
      .def(py::init<std::string, int>(), py::arg("name"), py::arg("width"))
      .def_readonly("name", &LaneSpec::name)
      .def_readonly("width", &LaneSpec::width)
      .def(py::self == py::self);
  py::class_<StageSpec>(m, "StageSpec", "Where a stage is cut and which lanes run its parts.")
      .def(py::init([](std::vector<double> split, const OneOrMore& lane, std::string reduce,
                       std::vector<int> gather, bool in_turn) {
             return StageSpec{std::move(split), lanes_of(lane), std::move(reduce),
                              std::move(gather), in_turn};
           }),
           py::arg("split") = std::vector<double>(), py::arg("lane") = "", py::arg("reduce") = "",
           py::arg("gather") = std::vector<int>(), py::arg("in_turn") = false)
      .def_readonly("split", &StageSpec::split)
      .def_readonly("lanes", &StageSpec::lanes, "One for all parts, or one for each.")
      .def_readonly("reduce", &StageSpec::reduce, "The lane of the stage's collectives.")
      .def_readonly("gather", &StageSpec::gather,
                    "Parts of stage o that gather attention outputs instead of summing products.")
      .def_readonly("in_turn", &StageSpec::in_turn,
                    "Whether its parts run one after the other, whatever lanes they are on.")
      .def(py::self == py::self);
  py::class_<Schedule>(m, "Schedule", "Which nano-batches run on which lane in what order.")
      .def(py::init<std::string, std::vector<LaneSpec>, std::map<std::string, StageSpec>,
                    std::vector<std::string>>(),
           py::arg("id"), py::arg("lanes"), py::arg("stages") = std::map<std::string, StageSpec>(),
           py::arg("order") = std::vector<std::string>())
      .def_readonly("id", &Schedule::id)
      .def_readonly("lanes", &Schedule::lanes)
      .def_readonly("stages", &Schedule::stages)
      .def_readonly("order", &Schedule::order)
      .def("lane_of", &Schedule::lane_of, py::arg("stage"), py::arg("part"),
           "The index in lanes of the one that runs a part of a stage.")
      .def("cuts", &Schedule::cuts, "Row fractions at which requests may not straddle.")
      .def_property_readonly("gathers", &Schedule::gathers, "Whether some part of o gathers.")
      .def("check", &Schedule::check, "Raises EngineError when the schedule is inconsistent.")
      .def(py::self == py::self);
  py::class_<NanoOp>(m, "NanoOp", "An op of a plan.")
      .def_readonly("name", &NanoOp::name, "As in \"layers.3.mlp.1 gemm\".")
      .def_readonly("lane", &NanoOp::lane, "Index in Plan.lanes.")
      .def_readonly("deps", &NanoOp::deps,
                    "Indices of the ops of other lanes that must have finished before it.");
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", "The ops of a step, placed and ordered.")
      .def("__repr__",
           [](const Plan& plan) {
             std::ostringstream text;
             text << plan;
             return text.str();
           })
      .def("__len__", [](const Plan& plan) { return plan.ops.size(); })
      .def_readonly("lanes", &Plan::lanes)
      .def_readonly("ops", &Plan::ops, "In order of issue.")
      .def(
          "validate",
          [](const Plan& plan, int device_width) { return validate(plan, device_width); },
          py::arg("device_width"), "Everything wrong with the plan; empty when it is sound.");
}

}  // namespace nanoflow
