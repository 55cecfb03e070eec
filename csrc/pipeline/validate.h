#pragma once

#include <string>
#include <vector>

#include "pipeline/plan.h"

namespace nanoflow {

/// Everything wrong with a plan, empty when it is sound: lanes that do not fit `device_width`, ids
/// and deps out of order, and pairs of conflicting accesses that no chain of lane order and deps
/// puts in order. Works from reads and writes alone and shares no code with the planner.
std::vector<std::string> validate(const Plan& plan, int device_width);

}  // namespace nanoflow
