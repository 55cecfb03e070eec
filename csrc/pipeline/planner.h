#pragma once

#include <vector>

#include "model/decoder.h"
#include "pipeline/plan.h"

namespace nanoflow {

/// An op before it has a place: the program in sequential order, one lane index each.
struct EmittedOp {
  Op op;
  OpLabel label;
  int lane = 0;
  bool in_turn = false;  // not beside another one of these
};

/// For every op, the earlier ops whose reads or writes conflict with it. Redundant edges through an
/// op that overwrites the same region are left out.
std::vector<std::vector<OpId>> find_hazards(const std::vector<EmittedOp>& program);

/// Places a program in the order of `issue` (a permutation of its indices). Of ops in turn each
/// depends on the one issued before it. Dependencies within a lane, and those that earlier waits of
/// the lane already imply, are dropped. Throws Error when the order runs an op before one that it
/// depends on.
Plan place(const std::vector<EmittedOp>& program, const std::vector<OpId>& issue,
           const std::vector<LaneSpec>& lanes);

/// The sequential program of the layers and the head that the key names, each stage cut as the
/// schedule says. Parts without rows are left out.
std::vector<EmittedOp> emit_program(const Decoder& decoder, const Schedule& schedule,
                                    const PlanKey& key);

/// emit, order as the schedule says, place. The plan has those of the schedule's lanes that its
/// stages run on.
Plan build_plan(const Decoder& decoder, const Schedule& schedule, const PlanKey& key);

}  // namespace nanoflow
