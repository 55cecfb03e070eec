#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/error.h"
#include "kernels/cpu/kernels.h"
#include "kernels/shapes.h"

// What requests ask of the logits before they are sampled: a row at a time, each on the thread that
// is free.

namespace nanoflow::cpu {
namespace {

void add_bias(const AddBias& op, int64_t row) {
  const int32_t* indptr = op.indptr.data<int32_t>();
  const int64_t entries = op.tokens.size(0), V = op.logits.size(1);
  NF_CHECK(0 <= indptr[row] && indptr[row] <= indptr[row + 1] && indptr[row + 1] <= entries,
           "add_bias: row ", row, " has [", indptr[row], ", ", indptr[row + 1], ") of ", entries,
           " entries");
  float* logits = op.logits.data<float>() + row * op.logits.stride(0);
  for (int32_t i = indptr[row]; i < indptr[row + 1]; ++i) {
    const int32_t token = op.tokens.data<int32_t>()[i];
    NF_CHECK(token >= 0 && token < V, "add_bias: row ", row, " has token ", token,
             " but the vocabulary has ", V);
    logits[token] += op.values.data<float>()[i];
  }
}

constexpr float kNever = -std::numeric_limits<float>::infinity();

void mask_row(const MaskLogits& op, int64_t row) {
  constexpr int64_t kBits = 32;
  const int32_t mask = op.mask_rows.data<int32_t>()[row];
  if (mask < 0) return;
  NF_CHECK(mask < op.masks.size(0), "mask_logits: row ", row, " has mask ", mask, ", but there is ",
           op.masks);
  const int32_t* words = op.masks.data<int32_t>() + mask * op.masks.stride(0);
  float* logits = op.logits.data<float>() + row * op.logits.stride(0);
  const int64_t V = op.logits.size(1);
  for (int64_t begin = 0; begin < V; begin += kBits) {
    const auto word = static_cast<uint32_t>(words[begin / kBits]);
    if (word == ~0u) continue;
    for (int64_t token = begin; token < std::min(begin + kBits, V); ++token) {
      if ((word >> (token - begin) & 1) == 0) logits[token] = kNever;
    }
  }
}

}  // namespace

void CpuKernels::run(const AddBias& op, Lane& lane) {
  check_shapes(op);
  cpu_lane(lane).enqueue([op](const Worker& worker) {
    const int64_t rows = op.logits.size(0);
    for (int64_t row = worker.claim(); row < rows; row = worker.claim()) add_bias(op, row);
  });
}

void CpuKernels::run(const MaskLogits& op, Lane& lane) {
  check_shapes(op);
  cpu_lane(lane).enqueue([op](const Worker& worker) {
    const int64_t rows = op.logits.size(0);
    for (int64_t row = worker.claim(); row < rows; row = worker.claim()) mask_row(op, row);
  });
}

}  // namespace nanoflow::cpu
