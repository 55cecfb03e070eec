#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/mirror.h"
#include "kernels/ops.h"

namespace nanoflow {

/// The op of that name with the fields that the keywords name, those of its tables among them.
/// Tensors are the arrays' own memory, or its copies in `mirror` where there is one.
///
/// Raises ValueError for an unknown name, TypeError for missing or unknown operands.
Op make_op(const std::string& name, const pybind11::kwargs& values, Mirror* mirror);

}  // namespace nanoflow
