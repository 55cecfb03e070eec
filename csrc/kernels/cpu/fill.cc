#include <algorithm>

#include "core/dtype.h"
#include "kernels/cpu/kernels.h"
#include "kernels/random.h"
#include "kernels/shapes.h"

namespace nanoflow::cpu {

void CpuKernels::run(const FillNormal& op, Lane& lane) {
  constexpr int64_t kGrain = 4096;  // values: whole cache lines of any dtype
  check_shapes(op);
  const float step = op.std / kNormalSumStd;
  const int64_t columns = std::max<int64_t>(1, op.out.size(op.out.dims() - 1));
  const int64_t gap = op.stride == 0 ? 0 : op.stride - columns;  // from a row to the next
  dispatch_float(op.out.dtype(), FillNormal::kName, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cpu_lane(lane).enqueue([op, step, columns, gap](const Worker& worker) {
      const auto [begin, end] = worker.share(op.out.numel(), kGrain);
      T* out = op.out.data<T>();
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t index = op.first + static_cast<uint64_t>(i + i / columns * gap);
        const auto sum = static_cast<float>(normal_sum(op.seed, index));
        out[i] = static_cast<T>(op.mean + step * sum);
      }
    });
  });
}

}  // namespace nanoflow::cpu
