#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "kernels/communicator.h"
#include "kernels/cuda/lane.h"
#include "kernels/kernels.h"

namespace nanoflow::cuda {

/// The ops on one GPU. run() launches on the lane's stream, with grids that fit the lane's SMs, and
/// can be captured in a graph.
class CudaKernels : public Kernels {
 public:
  /// `batch_invariant`: see BackendOptions.
  CudaKernels(const DeviceInfo& device, std::unique_ptr<Communicator> communicator,
              bool batch_invariant)
      : device_(device),
        communicator_(std::move(communicator)),
        batch_invariant_(batch_invariant) {}
  Communicator& communicator() { return *communicator_; }

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
  void run(const AllReduce& op, Lane& lane) override;
  void run(const AllGather& op, Lane& lane) override;

 private:
  DeviceInfo device_;
  std::unique_ptr<Communicator> communicator_;
  bool batch_invariant_;
};

}  // namespace nanoflow::cuda
