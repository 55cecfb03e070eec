#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/tensor.h"
#include "kernels/backend.h"

namespace nanoflow {

/// Rows [from, from + count) of a source, which fill those of a target from `row` on.
struct RowRun {
  int64_t from, row, count;
};

/// Rows in host memory, of which the target takes as many values as its own rows have.
struct SourceRows {
  const void* data;  // the first value that is taken of row 0
  DType dtype;
  int64_t stride;  // values from a row to the next
};

/// Brings rows from pageable host memory to a device, and converts between floating dtypes on the
/// way. Several threads fill one pinned buffer while the other is copied; only a buffer that is
/// still being copied is waited for.
class Uploader {
 public:
  explicit Uploader(Backend& backend);
  ~Uploader();  // waits for the copies

  /// Fills the runs of `target` from `source`, which may be gone once this returns. What reaches
  /// the target is there after finish().
  void write(const Tensor& target, const std::vector<RowRun>& runs, const SourceRows& source);
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
