#include "kernels/cuda/graph.h"

#include <exception>
#include <type_traits>

#include "core/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/lane.h"

namespace nanoflow::cuda {
namespace {

class CudaGraph : public Graph {
 public:
  /// Takes `executable`.
  CudaGraph(int device, cudaGraphExec_t executable) : device_(device), executable_(executable) {}
  CudaGraph(const CudaGraph&) = delete;
  ~CudaGraph() override {
    cudaSetDevice(device_);
    cudaGraphExecDestroy(executable_);
  }

  void launch(Lane& lane) override {
    NF_CUDA_CHECK(cudaGraphLaunch(executable_, cuda_lane(lane).stream()));
  }
  size_t bytes() const override { return bytes_; }
  void set_bytes(size_t bytes) { bytes_ = bytes; }

 private:
  int device_;
  cudaGraphExec_t executable_;
  size_t bytes_ = 0;
};

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using Recording = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;

/// What `enqueue` gives to the stream. The capture ends, whatever happens.
Recording record(cudaStream_t stream, const std::function<void()>& enqueue) {
  NF_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  std::exception_ptr error;
  try {
    enqueue();
  } catch (...) {
    error = std::current_exception();
  }
  cudaGraph_t graph = nullptr;
  const cudaError_t status = cudaStreamEndCapture(stream, &graph);
  Recording recording(graph);
  if (error != nullptr) {
    cudaGetLastError();  // of a capture cut short; the cause is in `error`
    std::rethrow_exception(error);
  }
  if (status != cudaSuccess) fail_runtime(status, "cudaStreamEndCapture");
  return recording;
}

size_t free_memory() {
  size_t free = 0, total = 0;
  NF_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return free;
}

}  // namespace

std::unique_ptr<Graph> capture_graph(Lane& origin, const std::function<void()>& enqueue) {
  const CudaLane& lane = cuda_lane(origin);
  try {
    const size_t free_before = free_memory();
    const Recording recording = record(lane.stream(), enqueue);
    cudaGraphExec_t executable = nullptr;
    NF_CUDA_CHECK(cudaGraphInstantiate(&executable, recording.get(), 0));
    auto graph = std::make_unique<CudaGraph>(lane.device().index, executable);
    NF_CUDA_CHECK(cudaGraphUpload(executable, lane.stream()));
    const size_t free_after = free_memory();
    graph->set_bytes(free_before > free_after ? free_before - free_after : 0);
    return graph;
  } catch (const std::exception& error) {
    fail("cannot capture a step as a CUDA graph: ", error.what(),
         "; enforce_eager=True runs steps without graphs");
  }
}

}  // namespace nanoflow::cuda
