#include <algorithm>
#include <cstdint>

#include "core/error.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/math_scratch.h"
#include "kernels/shapes.h"

// What requests have said so far, and what it costs them to say it again: a row at a time, each on
// the thread that is free.

namespace nanoflow::cpu {
namespace {

/// In what a thread counts of a token: the prompt holds it.
constexpr uint32_t kInPrompt = 1u << 31;

int32_t entry(const Tensor& tensor, int64_t index) { return tensor.data<int32_t>()[index]; }

struct Penalties {
  float presence, frequency, repetition;

  float apply(float logit, uint32_t seen) const {
    const uint32_t times = seen & ~kInPrompt;
    logit = logit > 0.0f ? logit / repetition : logit * repetition;
    return times == 0 ? logit : logit - frequency * static_cast<float>(times) - presence;
  }
};

/// `seen` [V] holds zeros before and after.
void penalize_row(const Penalize& op, int64_t row, uint32_t* seen) {
  const PenaltyTables& tables = op.tables;
  const int32_t slot = entry(tables.slots, row), length = entry(tables.length, row);
  const int32_t generated = entry(tables.generated, row);
  NF_CHECK(slot >= 0 && slot < op.history.size(0) && length <= op.history.size(1) &&
               generated >= 0 && generated <= length,
           "penalize: row ", row, " has ", length, " tokens, ", generated,
           " of them generated, in history ", slot, ", but there is ", op.history);
  const int32_t* history = op.history.data<int32_t>() + slot * op.history.stride(0);
  const int64_t V = op.logits.size(1);
  for (int32_t i = 0; i < length; ++i) {
    NF_CHECK(history[i] >= 0 && history[i] < V, "penalize: row ", row, " has token ", history[i],
             " at position ", i, " but the vocabulary has ", V);
  }
  for (int32_t i = 0; i < length - generated; ++i) seen[history[i]] = kInPrompt;
  for (int32_t i = length - generated; i < length; ++i) ++seen[history[i]];
  const Penalties penalties{.presence = tables.presence.data<float>()[row],
                            .frequency = tables.frequency.data<float>()[row],
                            .repetition = tables.repetition.data<float>()[row]};
  float* logits = op.logits.data<float>() + row * op.logits.stride(0);
  for (int32_t i = 0; i < length; ++i) {
    uint32_t& times = seen[history[i]];
    if (times == 0) continue;  // done
    logits[history[i]] = penalties.apply(logits[history[i]], times);
    times = 0;
  }
}

}  // namespace

void CpuKernels::run(const Penalize& op, Lane& lane) {
  check_shapes(op);
  const int64_t rows = op.logits.size(0), V = op.logits.size(1);
  ScratchPieces pieces(nullptr);
  pieces.take<uint32_t>(V);
  const size_t scratch = pieces.bytes();
  cpu_lane(lane).enqueue(
      [op, rows, V, scratch](const Worker& worker) {
        uint32_t* seen = nullptr;
        for (int64_t row = worker.claim(); row < rows; row = worker.claim()) {
          if (entry(op.tables.length, row) == 0) continue;
          if (seen == nullptr) {
            seen = reinterpret_cast<uint32_t*>(worker.scratch() +
                                               scratch * static_cast<size_t>(worker.index()));
            std::fill(seen, seen + V, 0u);
          }
          penalize_row(op, row, seen);
        }
      },
      scratch * static_cast<size_t>(lane.width()));
}

void CpuKernels::run(const RecordSamples& op, Lane& lane) {
  check_shapes(op);
  cpu_lane(lane).enqueue([op](const Worker& worker) {
    if (worker.index() != 0) return;
    for (int64_t row = 0; row < op.sampled.size(0); ++row) {
      const int32_t slot = entry(op.slots, row), length = entry(op.length, row);
      if (length <= 0 || length >= op.history.size(1)) continue;
      NF_CHECK(slot >= 0 && slot < op.history.size(0), "record_samples: row ", row, " has history ",
               slot, ", but there is ", op.history);
      int32_t* history = op.history.data<int32_t>() + slot * op.history.stride(0);
      history[length] = std::max(entry(op.sampled, row), 0);  // as Sample has it
    }
  });
}

}  // namespace nanoflow::cpu
