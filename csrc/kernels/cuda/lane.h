#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>

#include "core/arena.h"
#include "kernels/backend.h"
#include "kernels/cuda/device.h"

namespace nanoflow::cuda {

class GreenContext;
class Notifier;

/// A stream: of the whole device, or of a green context that holds the lane's SMs alone.
///
/// Streams share the hardware queues of a process, 8 by default: where more lanes are to run side
/// by side, start the process with CUDA_DEVICE_MAX_CONNECTIONS=32.
///
/// An error of the device (an illegal address, say) ruins the device's context for the whole
/// process: every lane and event then reports it, and clear_error() cannot help.
class CudaLane : public Lane {
 public:
  /// Memory that the kernels of a lane share, one after another.
  static constexpr size_t kWorkspaceBytes = size_t{64} << 20;

  /// A lane of the whole device whose kernels are to fill `width` SMs.
  CudaLane(const DeviceInfo& device, int width);
  /// A lane that only copies and stamps, which has no workspace.
  explicit CudaLane(const DeviceInfo& device);
  /// A lane of a partition, with all of its SMs.
  CudaLane(const DeviceInfo& device, std::unique_ptr<GreenContext> partition);
  ~CudaLane() override;  // runs what is queued

  cudaStream_t stream() const { return stream_; }
  /// Device memory of kWorkspaceBytes for the kernel that runs, its contents undefined. The address
  /// never changes.
  std::byte* workspace() const { return workspace_.data(); }
  const DeviceInfo& device() const { return device_; }

  /// SMs.
  int width() const override { return width_; }
  void wait(Event& event) override;
  void record(Event& event) override;
  /// Calls fn on a thread of the lane's own: the stream does not wait for it, and fn may take its
  /// time, but it must not make CUDA calls on this lane.
  void notify(std::function<void(std::exception_ptr)> fn) override;
  /// `ns` lies in memory of Backend::allocate_host().
  void stamp(int64_t* ns) override;
  void delay(std::chrono::microseconds time) override;
  void clear_error() override;
  void begin_range(const char* name) override;
  void end_range() override;

 private:
  DeviceInfo device_;
  int width_;
  std::unique_ptr<GreenContext> partition_;  // null for a lane of the whole device
  Buffer workspace_;
  cudaStream_t stream_;
  std::unique_ptr<Notifier> notifier_;  // made by the first notify
};

/// The lane as what it is, its device made the calling thread's current one. Error for a lane of
/// another backend.
CudaLane& cuda_lane(Lane& lane);

std::unique_ptr<Event> make_cuda_event(int device);

/// Device memory, 256-byte aligned; Error naming what was asked for and what is free.
Buffer allocate_device(int device, size_t bytes);

}  // namespace nanoflow::cuda
