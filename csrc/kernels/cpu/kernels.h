#pragma once

#include <memory>
#include <utility>

#include "kernels/communicator.h"
#include "kernels/cpu/lane.h"
#include "kernels/kernels.h"

namespace nanoflow::cpu {

/// Instruction sets, each a superset of the one before in speed, not in results: sums are taken in
/// another order, so tokens may differ between them, never between batch splits of one of them.
enum class Isa {
  kGeneric,     // plain C++
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16,  // and bf16 dot products
  kAmx,         // and bf16 matrix tiles
};

class CpuKernels : public Kernels {
 public:
  CpuKernels(Isa isa, std::unique_ptr<Communicator> communicator)
      : isa_(isa), communicator_(std::move(communicator)) {}
  Communicator& communicator() { return *communicator_; }

  void run(const Embed& op, Lane& lane) override;
  void run(const RmsNorm& op, Lane& lane) override;
  void run(const Gemm& op, Lane& lane) override;
  void run(const GemmSiluMul& op, Lane& lane) override;
  void run(const RopeAppend& op, Lane& lane) override;
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
  Isa isa_;
  std::unique_ptr<Communicator> communicator_;
};

}  // namespace nanoflow::cpu
