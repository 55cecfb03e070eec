#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

namespace nanoflow::cuda {

/// The SMs of a device are dealt in groups of this many (compute capability 9.0).
inline constexpr int kSmGroup = 8;

/// SMs that run only what is enqueued on streams of this context. Memory is shared with the whole
/// device.
class GreenContext {
 public:
  /// Owns the context.
  GreenContext(CUgreenCtx context, int sm_count) : context_(context), sm_count_(sm_count) {}
  GreenContext(const GreenContext&) = delete;
  ~GreenContext();  // its streams must have been destroyed

  int sm_count() const { return sm_count_; }
  /// A stream that does not synchronise with the default stream; the caller destroys it.
  cudaStream_t make_stream() const;

 private:
  CUgreenCtx context_;
  int sm_count_;
};

/// How many of `groups` groups of SMs each lane gets. Every lane but the widest (the first of the
/// widest) gets its width rounded to the nearest multiple of kSmGroup, at least one group, and the
/// widest takes all that is left. Throws Error where nothing is left for it.
std::vector<int> deal_groups(const std::vector<int>& widths, int groups);

/// Splits the device once into disjoint contexts, one a width. SMs beyond the last whole group go
/// to the widest lane, so that no SM idles: 132 SMs and widths {108, 24} give 108 and 24.
std::vector<std::unique_ptr<GreenContext>> partition_device(int device,
                                                            const std::vector<int>& widths);

}  // namespace nanoflow::cuda
