#include "kernels/cpu/gemm.h"

#include "kernels/shapes.h"

namespace nanoflow::cpu {
namespace {

template <typename Op>
GemmArgs args_of(const Op& op) {
  return {.x = op.x.bytes(),
          .weight = op.weight.bytes(),
          .bias = nullptr,
          .out = op.out.bytes(),
          .T = op.x.size(0),
          .N = op.weight.size(0),
          .K = op.x.size(1),
          .x_stride = op.x.stride(0),
          .weight_stride = op.weight.stride(0),
          .out_stride = op.out.stride(0),
          .accumulate = false,
          .activation = Activation::kSilu};
}

void enqueue(const GemmArgs& args, const GemmKernel& kernel, Lane& lane) {
  if (args.T == 0 || args.N == 0) return;
  CpuLane& own = cpu_lane(lane);
  own.enqueue([args, run = kernel.run](const Worker& worker) { run(args, worker); },
              kernel.scratch_bytes(args, own.width()));
}

}  // namespace

void CpuKernels::run(const Gemm& op, Lane& lane) {
  check_shapes(op);
  const GemmKernels& kernels = gemm_kernels(isa_, op.x.dtype());
  GemmArgs args = args_of(op);
  args.bias = op.bias.bytes();
  args.accumulate = op.accumulate;
  enqueue(args, op.out.dtype() == op.x.dtype() ? kernels.same : kernels.f32, lane);
}

void CpuKernels::run(const GemmSiluMul& op, Lane& lane) {
  check_shapes(op);
  GemmArgs args = args_of(op);
  args.activation = op.activation;
  enqueue(args, gemm_kernels(isa_, op.x.dtype()).silu_mul, lane);
}

}  // namespace nanoflow::cpu
