#include "kernels/cuda/check.h"
#include "kernels/cuda/gemm_sm90.h"
#include "kernels/cuda/grouped_gemm_sm90.h"
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

/// `weight` [N, K]: the op's, or that of its first expert.
template <typename Op>
GemmArguments arguments_of(const Op& op, const Tensor& weight, const CudaLane& lane) {
  check_alignment(Op::kName, "x", op.x);
  check_alignment(Op::kName, "weight", weight);
  if (op.out.dtype() != DType::kF32) check_alignment(Op::kName, "out", op.out);
  return {.x = op.x.bytes(),
          .weight = weight.bytes(),
          .bias = nullptr,
          .out = op.out.bytes(),
          .shape = {.rows = static_cast<int>(op.x.size(0)),
                    .features = static_cast<int>(weight.size(0)),
                    .depth = static_cast<int>(op.x.size(1))},
          .x_stride = op.x.stride(0),
          .weight_stride = weight.stride(0),
          .out_stride = op.out.stride(0),
          .accumulate = false,
          .is_gelu = false,
          .sms = lane.width(),
          .workspace = lane.workspace(),
          .workspace_bytes = CudaLane::kWorkspaceBytes,
          .stream = lane.stream()};
}

void launch(std::string_view op, const GemmArguments& arguments, const GemmType& type,
            bool batch_invariant) {
  if (arguments.shape.rows == 0) return;
  const GemmKernel kernel =
      batch_invariant ? kInvariantGemm : choose_gemm(arguments.shape, arguments.sms, type);
  const GemmLauncher launcher = gemm_launcher(kernel, type);
  NF_CHECK(launcher != nullptr, op, ": no GPU kernel multiplies ", type.x, " into ", type.out,
           "; use bfloat16 or float16");
  launcher(arguments);
}

template <typename Op>
void launch_grouped(const Op& op, GroupedGemmLauncher bf16, GroupedGemmLauncher f16, Lane& lane,
                    bool batch_invariant) {
  check_shapes(op);
  check_alignment(Op::kName, "weight", op.weight);
  const GroupedGemmArguments arguments{
      .all = arguments_of(op, op.weight.select(0, 0), cuda_lane(lane)),
      .offsets = op.offsets.template data<int32_t>(),
      .experts = static_cast<int>(op.weight.size(0)),
      .expert_stride = op.weight.stride(0),
      .batch_invariant = batch_invariant};
  const DType dtype = op.x.dtype();
  NF_CHECK(dtype == DType::kBF16 || dtype == DType::kF16, Op::kName, ": no GPU kernel multiplies ",
           dtype, "; use bfloat16 or float16");
  if (arguments.all.shape.rows == 0) return;
  (dtype == DType::kBF16 ? bf16 : f16)(arguments);
}

}  // namespace

void CudaKernels::run(const Gemm& op, Lane& lane) {
  check_shapes(op);
  GemmArguments arguments = arguments_of(op, op.weight, cuda_lane(lane));
  if (op.bias) check_alignment(Gemm::kName, "bias", op.bias);
  arguments.bias = op.bias.bytes();
  arguments.accumulate = op.accumulate;
  launch(Gemm::kName, arguments, {.x = op.x.dtype(), .out = op.out.dtype()}, batch_invariant_);
}

void CudaKernels::run(const GemmSiluMul& op, Lane& lane) {
  check_shapes(op);
  GemmArguments arguments = arguments_of(op, op.weight, cuda_lane(lane));
  arguments.is_gelu = op.activation == Activation::kGeluTanh;
  launch(GemmSiluMul::kName, arguments,
         {.x = op.x.dtype(), .out = op.out.dtype(), .is_silu_mul = true}, batch_invariant_);
}

void CudaKernels::run(const GroupedGemm& op, Lane& lane) {
  launch_grouped(op, grouped_gemm_bf16, grouped_gemm_f16, lane, batch_invariant_);
}

void CudaKernels::run(const GroupedGemmSiluMul& op, Lane& lane) {
  launch_grouped(op, grouped_gemm_bf16_silu_mul, grouped_gemm_f16_silu_mul, lane, batch_invariant_);
}

}  // namespace nanoflow::cuda
