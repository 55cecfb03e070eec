#include "kernels/backend.h"

#include <algorithm>
#include <numeric>
#include <sstream>

#include "core/error.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/copy_comm.h"
#include "kernels/cuda/graph.h"
#include "kernels/cuda/green.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/lane.h"
#include "kernels/cuda/nccl_comm.h"

namespace nanoflow::cuda {
namespace {

constexpr int kRowGranularity = 64;  // rows of the smallest GEMM tile

class CudaBackend : public Backend {
 public:
  CudaBackend(const DeviceInfo& device, std::unique_ptr<Communicator> communicator,
              bool batch_invariant)
      : device_(device), kernels_(device, std::move(communicator), batch_invariant) {}

  Device device() const override { return {Device::Kind::kCuda, device_.index}; }
  std::string description() const override {
    std::ostringstream text;
    text << device() << " (" << device_.name << ", " << device_.sm_count << " SMs)";
    return text.str();
  }
  int width() const override { return device_.sm_count; }
  int row_granularity() const override { return kRowGranularity; }

  size_t total_memory() const override { return memory_of(device_.index).total; }
  size_t free_memory() const override { return memory_of(device_.index).free; }

  Buffer allocate(size_t bytes) override { return allocate_device(device_.index, bytes); }

  Buffer allocate_host(size_t bytes) override {
    if (bytes == 0) return Buffer(nullptr, 0, Device{}, nullptr);
    NF_CUDA_CHECK(cudaSetDevice(device_.index));
    void* data = nullptr;
    NF_CUDA_CHECK(cudaHostAlloc(&data, bytes, cudaHostAllocPortable));
    return Buffer(data, bytes, Device{}, [](void* memory) { cudaFreeHost(memory); });
  }

  std::unique_ptr<Lane> make_lane(int width) override {
    NF_CHECK(width >= 1 && width <= device_.sm_count, "a lane of ", description(), " has 1 to ",
             device_.sm_count, " SMs, not ", width);
    NF_CUDA_CHECK(cudaSetDevice(device_.index));
    return std::make_unique<CudaLane>(device_, width);
  }

  std::vector<std::unique_ptr<Lane>> make_lanes(const std::vector<int>& widths) override {
    const int sum = std::accumulate(widths.begin(), widths.end(), 0);
    if (widths.size() < 2 || sum > device_.sm_count) return Backend::make_lanes(widths);
    for (int width : widths) NF_CHECK(width >= 1, "a lane cannot have ", width, " SMs");
    NF_CUDA_CHECK(cudaSetDevice(device_.index));
    std::vector<std::unique_ptr<Lane>> lanes;
    for (std::unique_ptr<GreenContext>& partition : partition_device(device_.index, widths)) {
      lanes.push_back(std::make_unique<CudaLane>(device_, std::move(partition)));
    }
    return lanes;
  }

  std::unique_ptr<Lane> make_copy_lane() override {
    NF_CUDA_CHECK(cudaSetDevice(device_.index));
    return std::make_unique<CudaLane>(device_);
  }

  std::unique_ptr<Event> make_event() override { return make_cuda_event(device_.index); }

  void copy(void* to, const void* from, size_t bytes, Lane& lane) override {
    if (bytes == 0) return;
    NF_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, cuda_lane(lane).stream()));
  }

  Kernels& kernels() override { return kernels_; }
  Communicator& communicator() override { return kernels_.communicator(); }

  std::unique_ptr<Graph> capture(Lane& origin, std::function<void()> enqueue) override {
    return capture_graph(origin, enqueue);
  }

  std::string model_problem(DType dtype, int head_dim) const override {
    if (dtype == DType::kBF16 || dtype == DType::kF16) return head_dim_problem(head_dim);
    std::ostringstream text;
    text << dtype << " has no GPU kernels; bfloat16 and float16 have";
    return text.str();
  }

  size_t attention_work_bytes(int requests, int rows, int num_heads,
                              int num_kv_heads) const override {
    return cuda::attention_work_bytes(requests, rows, num_heads / num_kv_heads, num_kv_heads,
                                      device_.sm_count);
  }

 private:
  DeviceInfo device_;
  CudaKernels kernels_;
};

/// Says that a device is missing for the ranks, where that is why it is wanted.
DeviceInfo open_device_of_rank(int index, int rank, int ranks) {
  try {
    return open_device(index);
  } catch (const Error& error) {
    if (rank == 0) throw;
    fail("tensor_parallel_size ", ranks, " needs ", ranks, " GPUs from cuda:", index - rank,
         " on, one a rank: ", error.what());
  }
}

}  // namespace
}  // namespace nanoflow::cuda

// What nanoflow_core looks up in this library.

extern "C" void nanoflow_make_cuda_backends(
    const nanoflow::BackendOptions& options, int ranks,
    std::vector<std::shared_ptr<nanoflow::Backend>>& backends) {
  using namespace nanoflow;
  NF_CHECK(options.threads == 0 && options.isa == "auto",
           "threads and isa are options of the CPU backend, not of device '", options.device, "'");
  NF_CHECK(!options.batch_invariant || ranks == 1, "batch_invariant is kept by one GPU, not by ",
           ranks, ": NCCL chooses the order of its sums by how many rows there are");
  std::vector<cuda::DeviceInfo> devices;
  std::vector<int> indices;
  for (int rank = 0; rank < ranks; ++rank) {
    indices.push_back(options.device.index + rank);
    devices.push_back(cuda::open_device_of_rank(indices.back(), rank, ranks));
  }
  std::vector<std::unique_ptr<Communicator>> communicators;
  if (ranks > 1 || options.nccl_alone) {
    communicators = cuda::make_nccl_communicators(indices, options.nccl_library);
  } else {
    communicators.push_back(cuda::make_copy_communicator(std::max(1, options.simulated_ranks)));
  }
  for (int rank = 0; rank < ranks; ++rank) {
    backends.push_back(std::make_shared<cuda::CudaBackend>(
        devices[rank], std::move(communicators[rank]), options.batch_invariant));
  }
}

extern "C" void nanoflow_find_cuda_problem(int index, std::string& problem) {
  problem = nanoflow::cuda::problem_of(nanoflow::cuda::probe_device(index));
}

extern "C" void nanoflow_find_cuda_bus_id(int index, std::string& id) {
  id = nanoflow::cuda::bus_id_of(index);
}
