#pragma once

#include "kernels/ops.h"

namespace nanoflow {

/// Throw Error where an op's operands do not fit together: what every backend checks before it
/// enqueues the op.
void check_shapes(const Embed& op);
void check_shapes(const RmsNorm& op);
void check_shapes(const Gemm& op);
void check_shapes(const GemmSiluMul& op);
void check_shapes(const RopeAppend& op);
void check_shapes(const GatherRows& op);
void check_shapes(const Sample& op);
void check_shapes(const FillNormal& op);
void check_shapes(const Penalize& op);
void check_shapes(const AddBias& op);
void check_shapes(const MaskLogits& op);
void check_shapes(const RecordSamples& op);
void check_shapes(const Logprobs& op);
void check_shapes(const RouteExperts& op);
void check_shapes(const SortByExpert& op);
void check_shapes(const GroupedGemm& op);
void check_shapes(const GroupedGemmSiluMul& op);
void check_shapes(const CombineExperts& op);
void check_shapes(const AllReduce& op, bool norms_sums);
void check_shapes(const AllGather& op, int ranks);

}  // namespace nanoflow
