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

/// Who gets which SMs.
struct Deal {
  std::vector<int> groups;  // of each lane
  size_t with_remainder;    // the lane that gets the SMs beyond the last whole group, too
};

/// Deals groups of SMs, and `remainder` more, to lanes as near to their widths as it goes: every
/// lane but the widest (the first of the widest) gets its width rounded to whole groups, at least
/// one, and the widest takes all that is left, so that no SM idles. Of 132 SMs, 16 groups and 4,
/// widths {108, 24} get 108 and 24, widths {104, 28} 104 and 28. Throws Error where nothing is left
/// for the widest.
Deal deal_groups(const std::vector<int>& widths, int groups, int remainder);

/// Splits the device once into disjoint contexts, one a width.
std::vector<std::unique_ptr<GreenContext>> partition_device(int device,
                                                            const std::vector<int>& widths);

}  // namespace nanoflow::cuda
