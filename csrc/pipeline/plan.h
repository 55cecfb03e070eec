#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "model/decoder.h"
#include "pipeline/schedule.h"

namespace nanoflow {

using OpId = int32_t;

/// Where an op comes from: stage part `part` of a layer.
struct OpLabel {
  Stage stage = Stage::kQkv;
  int layer = 0;
  int part = 0;
};

/// An op on one row range, on a lane, with the ops of other lanes that must have finished before
/// it.
struct NanoOp {
  Op op;
  OpLabel label;
  std::string name;         // label_of() it
  OpId id = 0;              // its index in Plan::ops
  int lane = 0;             // index in Plan::lanes
  std::vector<OpId> deps;   // on other lanes; order within a lane is the order of ids
  bool is_awaited = false;  // some op's deps name it
};

/// What a plan is valid for, apart from its schedule. A step runs two plans, so that their keys do
/// not multiply: that of its layers and that of its head.
struct PlanKey {
  std::vector<int> segment_rows;  // padded; none for a plan without layers
  int samples = 0;                // padded; 0 for a plan without head
  HeadOptions options = {};       // of the head

  auto operator<=>(const PlanKey&) const = default;

  PlanKey layers() const { return {.segment_rows = segment_rows, .samples = 0}; }
  PlanKey head() const { return {.segment_rows = {}, .samples = samples, .options = options}; }
};

/// Ops in order of issue, bound to one rank's buffers; immutable. Valid for any batch of its key.
struct Plan {
  std::string schedule_id;
  PlanKey key;
  std::vector<LaneSpec> lanes;
  std::vector<NanoOp> ops;
};

/// As in "layers.3.mlp.1 gemm".
std::string label_of(const NanoOp& op);
/// One line an op: id, lane, label, shapes of what it writes, deps.
std::ostream& operator<<(std::ostream& out, const Plan& plan);

}  // namespace nanoflow
