#include "kernels/cpu/gemm.h"

#include "core/error.h"
#include "core/match.h"

namespace nanoflow::cpu {

void CpuKernels::run(const Gemm& op, Lane& lane) {
  const DType dtype = op.x.dtype();
  ShapeMatcher match(Gemm::kName);
  match("x", op.x, {"T", "K"}).contiguous_rows();
  match("weight", op.weight, {"N", "K"}).dtype(dtype).contiguous_rows();
  match("out", op.out, {"T", "N"}).contiguous_rows();
  NF_CHECK(op.out.dtype() == dtype || op.out.dtype() == DType::kF32, Gemm::kName, ": out is ",
           op.out, " but must be ", dtype, " or ", DType::kF32);
  NF_CHECK(match["K"] > 0, Gemm::kName, ": x is ", op.x, ", without a column");
  const GemmKernels& kernels = gemm_kernels(isa_, dtype);
  const GemmKernel& kernel = op.out.dtype() == dtype ? kernels.same : kernels.f32;
  if (match["T"] == 0 || match["N"] == 0) return;
  CpuLane& own = cpu_lane(lane);
  const GemmArgs args{.x = op.x.bytes(),
                      .weight = op.weight.bytes(),
                      .out = op.out.bytes(),
                      .T = match["T"],
                      .N = match["N"],
                      .K = match["K"],
                      .x_stride = op.x.stride(0),
                      .weight_stride = op.weight.stride(0),
                      .out_stride = op.out.stride(0)};
  own.enqueue([args, run = kernel.run](const Worker& worker) { run(args, worker); },
              kernel.scratch_bytes(args, own.width()));
}

}  // namespace nanoflow::cpu
