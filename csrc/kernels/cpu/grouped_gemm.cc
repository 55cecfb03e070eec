#include <atomic>
#include <new>

#include "core/error.h"
#include "kernels/cpu/gemm.h"
#include "kernels/shapes.h"

// A product for each expert, one after another, each by all threads of the lane.

namespace nanoflow::cpu {
namespace {

using Claims = std::atomic<int64_t>;
constexpr size_t kScratchAlign = 64;

/// What an expert's product differs in from that of all rows.
struct Experts {
  const int32_t* offsets;  // [count + 1]
  int64_t count, rows;
  int64_t x_row_bytes, out_row_bytes, weight_bytes;  // weight_bytes: from expert to expert

  GemmArgs select(GemmArgs args, int64_t expert) const {
    const int64_t begin = offsets[expert], end = offsets[expert + 1];
    NF_CHECK(begin >= 0 && begin <= end && end <= rows, "expert ", expert, " has rows [", begin,
             ", ", end, ") of ", rows);
    args.T = end - begin;
    args.x = static_cast<const std::byte*>(args.x) + begin * x_row_bytes;
    args.out = static_cast<std::byte*>(args.out) + begin * out_row_bytes;
    args.weight = static_cast<const std::byte*>(args.weight) + expert * weight_bytes;
    return args;
  }
};

/// One thread's part of all products. `claims` [experts] begins the scratch.
void run_experts(const GemmArgs& all, const Experts& experts, const GemmKernel& kernel,
                 size_t claims_bytes, const Worker& worker) {
  auto* claims = reinterpret_cast<Claims*>(worker.scratch());
  if (worker.index() == 0) {
    for (int64_t expert = 0; expert < experts.count; ++expert) new (claims + expert) Claims(0);
  }
  worker.sync();
  const bool shares_scratch = kernel.scratch_bytes(all, worker.width()) > 0;
  bool is_first = true;
  for (int64_t expert = 0; expert < experts.count; ++expert) {
    const GemmArgs args = experts.select(all, expert);
    if (args.T == 0) continue;
    if (shares_scratch && !is_first) worker.sync();  // until nobody reads the last expert's part
    kernel.run(args, worker.part(claims[expert], claims_bytes));
    is_first = false;
  }
}

template <typename Op>
void enqueue(const Op& op, const GemmKernel& kernel, Lane& lane) {
  check_shapes(op);
  const auto item = static_cast<int64_t>(size_of(op.x.dtype()));
  const GemmArgs args{.x = op.x.bytes(),
                      .weight = op.weight.bytes(),
                      .bias = nullptr,
                      .out = op.out.bytes(),
                      .T = op.x.size(0),
                      .N = op.weight.size(1),
                      .K = op.x.size(1),
                      .x_stride = op.x.stride(0),
                      .weight_stride = op.weight.stride(1),
                      .out_stride = op.out.stride(0),
                      .accumulate = false,
                      .activation = Activation::kSilu};
  if (args.T == 0 || args.N == 0) return;
  const Experts experts{.offsets = op.offsets.template data<int32_t>(),
                        .count = op.weight.size(0),
                        .rows = args.T,
                        .x_row_bytes = args.x_stride * item,
                        .out_row_bytes = args.out_stride * item,
                        .weight_bytes = op.weight.stride(0) * item};
  const size_t claims_bytes =
      (static_cast<size_t>(experts.count) * sizeof(Claims) + kScratchAlign - 1) / kScratchAlign *
      kScratchAlign;
  CpuLane& own = cpu_lane(lane);
  own.enqueue(
      [=, &kernel](const Worker& worker) {
        run_experts(args, experts, kernel, claims_bytes, worker);
      },
      claims_bytes + kernel.scratch_bytes(args, own.width()));
}

}  // namespace

void CpuKernels::run(const GroupedGemm& op, Lane& lane) {
  enqueue(op, gemm_kernels(isa_, op.x.dtype()).same, lane);
}

void CpuKernels::run(const GroupedGemmSiluMul& op, Lane& lane) {
  enqueue(op, gemm_kernels(isa_, op.x.dtype()).silu_mul, lane);
}

}  // namespace nanoflow::cpu
