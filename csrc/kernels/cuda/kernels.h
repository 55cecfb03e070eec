#pragma once

#include <cstdint>

#include "kernels/cuda/lane.h"
#include "kernels/kernels.h"

namespace nanoflow::cuda {

/// The ops on one GPU. run() launches on the lane's stream, with grids that fit the lane's SMs, and
/// can be captured in a graph.
class CudaKernels : public Kernels {
 public:
  explicit CudaKernels(const DeviceInfo& device) : device_(device) {}

  void run(const Embed& op, Lane& lane) override;
  void run(const RmsNorm& op, Lane& lane) override;
  void run(const Gemm& op, Lane& lane) override;
  void run(const GemmSiluMul& op, Lane& lane) override;
  void run(const RopeAppend& op, Lane& lane) override;
  void run(const PlanAttention& op, Lane& lane) override;
  void run(const Attention& op, Lane& lane) override;
  void run(const GatherRows& op, Lane& lane) override;
  void run(const Sample& op, Lane& lane) override;
  void run(const FillNormal& op, Lane& lane) override;
  void run(const Penalize& op, Lane& lane) override;
  void run(const AddBias& op, Lane& lane) override;
  void run(const MaskLogits& op, Lane& lane) override;
  void run(const RecordSamples& op, Lane& lane) override;
  void run(const Logprobs& op, Lane& lane) override;
  void run(const RouteExperts& op, Lane& lane) override;
  void run(const SortByExpert& op, Lane& lane) override;
  void run(const GroupedGemm& op, Lane& lane) override;
  void run(const GroupedGemmSiluMul& op, Lane& lane) override;
  void run(const CombineExperts& op, Lane& lane) override;

 private:
  DeviceInfo device_;
};

}  // namespace nanoflow::cuda
