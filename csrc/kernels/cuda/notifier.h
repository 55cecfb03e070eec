#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace nanoflow::cuda {

/// Calls functions, in order, once a stream has reached where they were pushed. A thread waits for
/// events: a host function in the stream would hold up the work behind it, and would not be called
/// at all once the device has failed.
class Notifier {
 public:
  explicit Notifier(int device);
  ~Notifier();  // calls what is left

  /// fn gets the error of the stream, or null. Called by the lane's host thread.
  void push(cudaStream_t stream, std::function<void(std::exception_ptr)> fn);

 private:
  struct Item {
    cudaEvent_t event;
    cudaError_t record_status;
    std::function<void(std::exception_ptr)> fn;
  };

  cudaEvent_t take_event();
  void loop();

  const int device_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> items_;          // guarded by mutex_
  std::vector<cudaEvent_t> spare_;  // guarded by mutex_
  bool is_stopping_ = false;        // guarded by mutex_
  std::thread thread_;
};

}  // namespace nanoflow::cuda
