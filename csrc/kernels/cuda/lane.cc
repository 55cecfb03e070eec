#include "kernels/cuda/lane.h"

#include <nvtx3/nvToolsExt.h>

#include <utility>

#include "core/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/clock.h"
#include "kernels/cuda/green.h"
#include "kernels/cuda/notifier.h"

namespace nanoflow::cuda {
namespace {

class CudaEvent : public Event {
 public:
  explicit CudaEvent(int device) {
    NF_CUDA_CHECK(cudaSetDevice(device));
    NF_CUDA_CHECK(
        cudaEventCreateWithFlags(&event_, cudaEventDisableTiming | cudaEventBlockingSync));
  }
  CudaEvent(const CudaEvent&) = delete;
  ~CudaEvent() override { cudaEventDestroy(event_); }

  void synchronize() override { NF_CUDA_CHECK(cudaEventSynchronize(event_)); }
  cudaEvent_t handle() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

cudaEvent_t handle_of(Event& event) {
  auto* own = dynamic_cast<CudaEvent*>(&event);
  NF_CHECK(own != nullptr, "a CUDA lane got an event of another backend");
  return own->handle();
}

cudaStream_t make_stream() {
  cudaStream_t stream;
  NF_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

}  // namespace

CudaLane::CudaLane(const DeviceInfo& device, int width)
    : device_(device),
      width_(width),
      workspace_(allocate_device(device.index, kWorkspaceBytes)),
      stream_(make_stream()) {}

CudaLane::CudaLane(const DeviceInfo& device)
    : device_(device),
      width_(1),
      workspace_(allocate_device(device.index, 0)),
      stream_(make_stream()) {}

CudaLane::CudaLane(const DeviceInfo& device, std::unique_ptr<GreenContext> partition)
    : device_(device),
      width_(partition->sm_count()),
      partition_(std::move(partition)),
      workspace_(allocate_device(device.index, kWorkspaceBytes)),
      stream_(partition_->make_stream()) {}

CudaLane::~CudaLane() {
  cudaSetDevice(device_.index);
  cudaStreamSynchronize(stream_);
  notifier_.reset();
  cudaStreamDestroy(stream_);
}

void CudaLane::wait(Event& event) {
  NF_CUDA_CHECK(cudaSetDevice(device_.index));
  NF_CUDA_CHECK(cudaStreamWaitEvent(stream_, handle_of(event), 0));
}

void CudaLane::record(Event& event) {
  NF_CUDA_CHECK(cudaSetDevice(device_.index));
  NF_CUDA_CHECK(cudaEventRecord(handle_of(event), stream_));
}

void CudaLane::notify(std::function<void(std::exception_ptr)> fn) {
  NF_CUDA_CHECK(cudaSetDevice(device_.index));
  if (notifier_ == nullptr) notifier_ = std::make_unique<Notifier>(device_.index);
  notifier_->push(stream_, std::move(fn));
}

void CudaLane::stamp(int64_t* ns) {
  NF_CUDA_CHECK(cudaSetDevice(device_.index));
  cudaPointerAttributes attributes;
  NF_CUDA_CHECK(cudaPointerGetAttributes(&attributes, ns));
  NF_CHECK(attributes.devicePointer != nullptr,
           "the device cannot write a stamp to this memory; take it from allocate_host()");
  launch_stamp(static_cast<int64_t*>(attributes.devicePointer), stream_);
}

void CudaLane::delay(std::chrono::microseconds time) {
  NF_CUDA_CHECK(cudaSetDevice(device_.index));
  launch_delay(std::chrono::nanoseconds(time).count(), stream_);
}

void CudaLane::clear_error() { cudaGetLastError(); }

void CudaLane::begin_range(const char* name) { nvtxRangePushA(name); }

void CudaLane::end_range() { nvtxRangePop(); }

CudaLane& cuda_lane(Lane& lane) {
  auto* own = dynamic_cast<CudaLane*>(&lane);
  NF_CHECK(own != nullptr, "a CUDA kernel got a lane of another backend");
  NF_CUDA_CHECK(cudaSetDevice(own->device().index));
  return *own;
}

std::unique_ptr<Event> make_cuda_event(int device) { return std::make_unique<CudaEvent>(device); }

Buffer allocate_device(int device, size_t bytes) {
  const Device place{Device::Kind::kCuda, device};
  if (bytes == 0) return Buffer(nullptr, 0, place, nullptr);
  NF_CUDA_CHECK(cudaSetDevice(device));
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    const DeviceMemory memory = memory_of(device);
    fail<OutOfMemory>("device '", place, "' is out of memory: ", bytes >> 20,
                      " MiB were asked for, ", memory.free >> 20, " of ", memory.total >> 20,
                      " MiB are free");
  }
  NF_CUDA_CHECK(status);
  return Buffer(data, bytes, place, [](void* memory) { cudaFree(memory); });
}

}  // namespace nanoflow::cuda
