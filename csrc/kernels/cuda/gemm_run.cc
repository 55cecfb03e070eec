#include "core/match.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm_sm90.h"
#include "kernels/cuda/kernels.h"

namespace nanoflow::cuda {
namespace {

constexpr int kTmaAlign = 16;  // bytes of an address or a row stride

void check_alignment(const char* name, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.bytes());
  const int64_t row_bytes = tensor.stride(0) * static_cast<int64_t>(size_of(tensor.dtype()));
  NF_CHECK(address % kTmaAlign == 0 && row_bytes % kTmaAlign == 0, "gemm: ", name, " ", tensor,
           " has rows ", row_bytes, " bytes apart at address ", address,
           "; the GPU needs both to be multiples of ", kTmaAlign);
}

}  // namespace

void CudaKernels::run(const Gemm& op, Lane& lane) {
  CudaLane& own = cuda_lane(lane);
  ShapeMatcher match("gemm");
  match("x", op.x, {"T", "K"}).contiguous_rows();
  match("weight", op.weight, {"N", "K"}).dtype(op.x.dtype()).contiguous_rows();
  match("out", op.out, {"T", "N"}).contiguous_rows();
  check_alignment("x", op.x);
  check_alignment("weight", op.weight);
  check_alignment("out", op.out);
  const GemmShape shape{.rows = static_cast<int>(match["T"]),
                        .features = static_cast<int>(match["N"]),
                        .depth = static_cast<int>(match["K"])};
  if (shape.rows == 0) return;
  const GemmKernel kernel = choose_gemm(shape, own.width(), op.x.dtype(), op.out.dtype());
  const GemmLauncher launch = gemm_launcher(kernel, op.x.dtype(), op.out.dtype());
  NF_CHECK(launch != nullptr, "gemm: no GPU kernel multiplies ", op.x.dtype(), " into ",
           op.out.dtype(), "; use bfloat16 or float16, into the same or float32");
  launch({.x = op.x.bytes(),
          .weight = op.weight.bytes(),
          .out = op.out.bytes(),
          .shape = shape,
          .x_stride = op.x.stride(0),
          .weight_stride = op.weight.stride(0),
          .out_stride = op.out.stride(0),
          .sms = own.width(),
          .workspace = own.workspace(),
          .workspace_bytes = CudaLane::kWorkspaceBytes,
          .stream = own.stream()});
}

}  // namespace nanoflow::cuda
