#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/columns.h"
#include "kernels/cuda/grid.h"

namespace nanoflow::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;

/// Sizes in units of U, which all of them are multiples of.
template <typename U>
__global__ void place_columns_kernel(const U* parts, U* out, int64_t rows, int64_t width,
                                     int64_t out_stride, int64_t columns, int64_t row_stride,
                                     int64_t part_stride) {
  const int64_t count = rows * width, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    const int64_t row = i / width, column = i % width;
    const int64_t part = column / columns;
    out[row * out_stride + column] =
        parts[part * part_stride + row * row_stride + column - part * columns];
  }
}

template <typename U>
bool is_whole(int64_t bytes) {
  return bytes % static_cast<int64_t>(sizeof(U)) == 0;
}

template <typename U>
bool launch(const ColumnParts& parts, const Tensor& out, CudaLane& lane) {
  const auto value = static_cast<int64_t>(size_of(out.dtype()));
  const int64_t width = out.size(1) * value, out_stride = out.stride(0) * value;
  const int64_t columns = parts.columns * value, row_stride = parts.row_stride * value;
  const int64_t part_stride = parts.part_stride * value;
  for (int64_t bytes :
       {width, out_stride, columns, row_stride, part_stride, reinterpret_cast<int64_t>(parts.data),
        reinterpret_cast<int64_t>(out.bytes())}) {
    if (!is_whole<U>(bytes)) return false;
  }
  constexpr int64_t kUnit = sizeof(U);
  const int64_t count = out.size(0) * width / kUnit;
  const int blocks = grid_size((count + kThreads - 1) / kThreads, kBlocksPerSm, lane);
  place_columns_kernel<U><<<blocks, kThreads, 0, lane.stream()>>>(
      static_cast<const U*>(parts.data), out.data<U>(), out.size(0), width / kUnit,
      out_stride / kUnit, columns / kUnit, row_stride / kUnit, part_stride / kUnit);
  NF_CUDA_CHECK(cudaGetLastError());
  return true;
}

}  // namespace

void place_columns(const ColumnParts& parts, const Tensor& out, CudaLane& lane) {
  if (out.numel() == 0) return;
  if (launch<uint4>(parts, out, lane) || launch<uint32_t>(parts, out, lane)) return;
  launch<uint16_t>(parts, out, lane);
}

}  // namespace nanoflow::cuda
