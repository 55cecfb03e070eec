#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm_sm90.h"
#include "kernels/cuda/kernels.h"
#include "kernels/shapes.h"

namespace nanoflow::cuda {
namespace {

constexpr int kTmaAlign = 16;  // bytes of an address or a row stride

/// Of a matrix's rows, or of a vector.
void check_alignment(std::string_view op, std::string_view name, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.bytes());
  const int64_t row = tensor.dims() == 1 ? 0 : tensor.stride(0);
  const int64_t row_bytes = row * static_cast<int64_t>(size_of(tensor.dtype()));
  NF_CHECK(address % kTmaAlign == 0 && row_bytes % kTmaAlign == 0, op, ": ", name, " ", tensor,
           " has rows ", row_bytes, " bytes apart at address ", address,
           "; the GPU needs both to be multiples of ", kTmaAlign);
}

template <typename Op>
GemmArguments arguments_of(const Op& op, const CudaLane& lane) {
  check_alignment(Op::kName, "x", op.x);
  check_alignment(Op::kName, "weight", op.weight);
  check_alignment(Op::kName, "out", op.out);
  return {.x = op.x.bytes(),
          .weight = op.weight.bytes(),
          .bias = nullptr,
          .out = op.out.bytes(),
          .shape = {.rows = static_cast<int>(op.x.size(0)),
                    .features = static_cast<int>(op.weight.size(0)),
                    .depth = static_cast<int>(op.x.size(1))},
          .x_stride = op.x.stride(0),
          .weight_stride = op.weight.stride(0),
          .out_stride = op.out.stride(0),
          .accumulate = false,
          .sms = lane.width(),
          .workspace = lane.workspace(),
          .workspace_bytes = CudaLane::kWorkspaceBytes,
          .stream = lane.stream()};
}

void launch(std::string_view op, const GemmArguments& arguments, const GemmType& type) {
  if (arguments.shape.rows == 0) return;
  const GemmKernel kernel = choose_gemm(arguments.shape, arguments.sms, type);
  const GemmLauncher launcher = gemm_launcher(kernel, type);
  NF_CHECK(launcher != nullptr, op, ": no GPU kernel multiplies ", type.x, " into ", type.out,
           "; use bfloat16 or float16");
  launcher(arguments);
}

}  // namespace

void CudaKernels::run(const Gemm& op, Lane& lane) {
  check_shapes(op);
  GemmArguments arguments = arguments_of(op, cuda_lane(lane));
  if (op.bias) check_alignment(Gemm::kName, "bias", op.bias);
  arguments.bias = op.bias.bytes();
  arguments.accumulate = op.accumulate;
  launch(Gemm::kName, arguments, {.x = op.x.dtype(), .out = op.out.dtype()});
}

void CudaKernels::run(const GemmSiluMul& op, Lane& lane) {
  check_shapes(op);
  launch(GemmSiluMul::kName, arguments_of(op, cuda_lane(lane)),
         {.x = op.x.dtype(), .out = op.out.dtype(), .is_silu_mul = true});
}

}  // namespace nanoflow::cuda
