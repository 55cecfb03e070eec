#pragma once

#include "core/dtype.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/pointwise.h"
#include "kernels/cpu/sampling.h"

namespace nanoflow::cpu {

/// The inner loops for one dtype, compiled for one instruction set.
struct Loops {
  PointwiseLoops pointwise;
  AttentionLoops attention;
};

/// The same of all dtypes.
struct LoopSet {
  Loops f32, bf16, f16;
  SamplingLoops sampling;

  /// Throws Error, naming `op`, for what is no float.
  const Loops& of(DType dtype, std::string_view op) const;
};

/// The fastest loops an instruction set can run.
const LoopSet& loop_set(Isa isa);

// One a math_<isa>.cc; only the first exists on other machines than x86-64.
extern const LoopSet kLoopsGeneric, kLoopsAvx2, kLoopsAvx512, kLoopsAvx512Bf16, kLoopsAmx;

}  // namespace nanoflow::cpu
