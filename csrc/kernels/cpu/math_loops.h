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

// One a file; those of *_avx*.cc exist on x86-64 only.
extern const LoopSet kLoopsGeneric, kLoopsAvx2, kLoopsAvx512;

}  // namespace nanoflow::cpu
