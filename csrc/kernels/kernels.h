#pragma once

#include "core/error.h"
#include "kernels/ops.h"

namespace nanoflow {

class Lane;

/// The operations of one backend. Every run() enqueues on the lane and returns: it never allocates
/// device memory, never synchronises, and reads shapes, not data. Shapes are checked before
/// anything is enqueued; what fails later is stored with the lane. An op that a backend forgets
/// does not compile.
class Kernels {
 public:
  virtual ~Kernels() = default;

  virtual void run(const Embed& op, Lane& lane) = 0;
  virtual void run(const RmsNorm& op, Lane& lane) = 0;
  virtual void run(const Gemm& op, Lane& lane) = 0;
  virtual void run(const GemmSiluMul& op, Lane& lane) = 0;
  virtual void run(const RopeAppend& op, Lane& lane) = 0;
  /// Overridden by backends whose attention_work_bytes() is not 0; others are never given one.
  virtual void run(const PlanAttention& op, Lane&) { fail(op.kName, " is no op of this backend"); }
  virtual void run(const Attention& op, Lane& lane) = 0;
  virtual void run(const GatherRows& op, Lane& lane) = 0;
  virtual void run(const Sample& op, Lane& lane) = 0;
  virtual void run(const FillNormal& op, Lane& lane) = 0;
  virtual void run(const Penalize& op, Lane& lane) = 0;
  virtual void run(const AddBias& op, Lane& lane) = 0;
  virtual void run(const MaskLogits& op, Lane& lane) = 0;
  virtual void run(const RecordSamples& op, Lane& lane) = 0;
  virtual void run(const Logprobs& op, Lane& lane) = 0;
  virtual void run(const RouteExperts& op, Lane& lane) = 0;
  virtual void run(const SortByExpert& op, Lane& lane) = 0;
  virtual void run(const GroupedGemm& op, Lane& lane) = 0;
  virtual void run(const GroupedGemmSiluMul& op, Lane& lane) = 0;
  virtual void run(const CombineExperts& op, Lane& lane) = 0;
  virtual void run(const AllReduce& op, Lane& lane) = 0;
  virtual void run(const AllGather& op, Lane& lane) = 0;
};

}  // namespace nanoflow
