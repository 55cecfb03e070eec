#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/grid.h"
#include "kernels/cuda/kernels.h"
#include "kernels/shapes.h"

// What requests ask of the logits before they are sampled. What lies outside a tensor is left
// alone.

namespace nanoflow::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;
constexpr int kBits = 32;
constexpr int kWindow = 8192;  // logits of a row that a block masks

struct Logits {
  float* data;  // [S, V]
  int64_t stride;
  int rows, vocabulary;

  explicit Logits(const Tensor& tensor)
      : data(tensor.data<float>()),
        stride(tensor.stride(0)),
        rows(static_cast<int>(tensor.size(0))),
        vocabulary(static_cast<int>(tensor.size(1))) {}
};

/// A block takes a row.
__global__ void __launch_bounds__(kThreads)
    bias_kernel(Logits logits, const int32_t* indptr, const int32_t* tokens, const float* values,
                int entries) {
  for (int row = blockIdx.x; row < logits.rows; row += gridDim.x) {
    const int end = min(indptr[row + 1], entries);
    for (int i = max(indptr[row], 0) + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      const int token = tokens[i];
      if (token < 0 || token >= logits.vocabulary) continue;
      logits.data[row * logits.stride + token] += values[i];
    }
  }
}

/// A block takes a window of a row. The threads of a warp share a word of the mask.
__global__ void __launch_bounds__(kThreads)
    mask_kernel(Logits logits, const int32_t* rows, const int32_t* masks, int64_t mask_stride,
                int num_masks) {
  const int windows = (logits.vocabulary + kWindow - 1) / kWindow;
  for (int item = blockIdx.x; item < logits.rows * windows; item += gridDim.x) {
    const int row = item / windows, begin = item % windows * kWindow;
    const int mask = rows[row];
    if (mask < 0 || mask >= num_masks) continue;
    const int end = min(begin + kWindow, logits.vocabulary);
    for (int token = begin + static_cast<int>(threadIdx.x); token < end; token += kThreads) {
      const auto word = static_cast<unsigned>(masks[mask * mask_stride + token / kBits]);
      if ((word >> (token % kBits) & 1u) == 0) {
        logits.data[row * logits.stride + token] = -INFINITY;
      }
    }
  }
}

}  // namespace

void CudaKernels::run(const AddBias& op, Lane& lane) {
  check_shapes(op);
  const Logits logits(op.logits);
  if (logits.rows == 0) return;
  const CudaLane& own = cuda_lane(lane);
  bias_kernel<<<grid_size(logits.rows, kBlocksPerSm, own), kThreads, 0, own.stream()>>>(
      logits, op.indptr.data<int32_t>(), op.tokens.data<int32_t>(), op.values.data<float>(),
      static_cast<int>(op.tokens.size(0)));
  NF_CUDA_CHECK(cudaGetLastError());
}

void CudaKernels::run(const MaskLogits& op, Lane& lane) {
  check_shapes(op);
  const Logits logits(op.logits);
  const int64_t items = int64_t{logits.rows} * ((logits.vocabulary + kWindow - 1) / kWindow);
  NF_CHECK(items <= INT32_MAX, "mask_logits on a GPU: ", op.logits, " has too many rows");
  if (items == 0) return;
  const CudaLane& own = cuda_lane(lane);
  mask_kernel<<<grid_size(items, kBlocksPerSm, own), kThreads, 0, own.stream()>>>(
      logits, op.mask_rows.data<int32_t>(), op.masks.data<int32_t>(), op.masks.stride(0),
      static_cast<int>(op.masks.size(0)));
  NF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace nanoflow::cuda
