#include "kernels/cuda/notifier.h"

#include <utility>

#include "core/error.h"
#include "kernels/cuda/check.h"

namespace nanoflow::cuda {
namespace {

std::exception_ptr to_exception(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  return std::make_exception_ptr(Error("CUDA: work on the device failed: " + describe(status)));
}

}  // namespace

Notifier::Notifier(int device) : device_(device), thread_([this] { loop(); }) {}

Notifier::~Notifier() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
    changed_.notify_one();
  }
  thread_.join();
  for (cudaEvent_t event : spare_) cudaEventDestroy(event);
}

cudaEvent_t Notifier::take_event() {
  {
    const std::lock_guard lock(mutex_);
    if (!spare_.empty()) {
      cudaEvent_t event = spare_.back();
      spare_.pop_back();
      return event;
    }
  }
  cudaEvent_t event;
  NF_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync));
  return event;
}

void Notifier::push(cudaStream_t stream, std::function<void(std::exception_ptr)> fn) {
  cudaEvent_t event = take_event();
  const cudaError_t status = cudaEventRecord(event, stream);
  const std::lock_guard lock(mutex_);
  items_.push_back({event, status, std::move(fn)});
  changed_.notify_one();
}

void Notifier::loop() {
  cudaSetDevice(device_);
  for (;;) {
    Item item;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return is_stopping_ || !items_.empty(); });
      if (items_.empty()) return;
      item = std::move(items_.front());
      items_.pop_front();
    }
    const cudaError_t status =
        item.record_status == cudaSuccess ? cudaEventSynchronize(item.event) : item.record_status;
    item.fn(to_exception(status));
    const std::lock_guard lock(mutex_);
    spare_.push_back(item.event);
  }
}

}  // namespace nanoflow::cuda
