#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/tensor.h"
#include "kernels/backend.h"

namespace nanoflow {

/// Consecutive rows of a source that fill consecutive rows of a target from `row` on.
struct RowRun {
  int64_t row, count;
};

/// Brings rows from pageable host memory to a device, and converts between floating dtypes on the
/// way. Several threads fill one pinned buffer while the other is copied; only a buffer that is
/// still being copied is waited for.
class Uploader {
 public:
  explicit Uploader(Backend& backend);
  ~Uploader();  // waits for the copies

  /// Fills the runs of `target` one after another from the contiguous rows at `from`, which may be
  /// gone once this returns. What reaches the target is there after finish().
  void write(const Tensor& target, const std::vector<RowRun>& runs, const void* from, DType dtype);
  /// Waits for all copies; rethrows what made one fail.
  void finish();
  /// What the copies are enqueued on.
  Lane& lane() { return *lane_; }

 private:
  static constexpr size_t kBufferBytes = size_t{32} << 20;

  struct Stage {
    Buffer buffer;
    std::unique_ptr<Event> copied;
  };

  Stage& free_stage(size_t bytes);

  Backend& backend_;
  std::unique_ptr<Lane> lane_;
  std::array<Stage, 2> stages_;
  size_t next_ = 0;
};

}  // namespace nanoflow
