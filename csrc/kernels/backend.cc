#include "kernels/backend.h"

#include <dlfcn.h>

#include <filesystem>
#include <utility>

#include "core/error.h"

namespace nanoflow {
namespace {

constexpr const char* kCudaLibrary = "libnanoflow_cuda.so";

/// The functions of the CUDA backend's library.
struct CudaLibrary {
  void (*make_backends)(const BackendOptions&, int ranks,
                        std::vector<std::shared_ptr<Backend>>& backends);
  void (*find_problem)(int index, std::string& problem);
  void (*find_bus_id)(int index, std::string& id);
};

/// Opens the library, which lies beside this one and stays open for good: backends outlive this
/// call.
CudaLibrary open_cuda_library(Device device) {
  Dl_info self;
  NF_CHECK(dladdr(reinterpret_cast<const void*>(&make_backend), &self) != 0,
           "cannot tell where nanoflow's core library lies");
  const auto path = std::filesystem::path(self.dli_fname).parent_path() / kCudaLibrary;
  NF_CHECK(std::filesystem::exists(path), "device '", device,
           "' needs nanoflow's CUDA backend, which this build does not contain; reinstall with "
           "pip install -C cmake.define.NANOFLOW_CUDA=ON on a machine with the CUDA toolkit 13.0, "
           "or use device='cpu'");
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  NF_CHECK(library != nullptr, "cannot open nanoflow's CUDA backend: ", dlerror());
  const auto function = [&](const char* name) {
    void* found = dlsym(library, name);
    NF_CHECK(found != nullptr, path.string(), " is not nanoflow's CUDA backend: ", dlerror());
    return found;
  };
  CudaLibrary cuda{};
  cuda.make_backends =
      reinterpret_cast<decltype(cuda.make_backends)>(function("nanoflow_make_cuda_backends"));
  cuda.find_problem =
      reinterpret_cast<decltype(cuda.find_problem)>(function("nanoflow_find_cuda_problem"));
  cuda.find_bus_id =
      reinterpret_cast<decltype(cuda.find_bus_id)>(function("nanoflow_find_cuda_bus_id"));
  return cuda;
}

/// The graph of backends that have none of their own.
class Recall : public Graph {
 public:
  explicit Recall(std::function<void()> enqueue) : enqueue_(std::move(enqueue)) {}
  void launch(Lane&) override { enqueue_(); }
  size_t bytes() const override { return 0; }

 private:
  std::function<void()> enqueue_;
};

}  // namespace

std::string Backend::model_problem(DType, int) const { return ""; }

size_t Backend::attention_work_bytes(int, int, int, int) const { return 0; }

std::vector<std::unique_ptr<Lane>> Backend::make_lanes(const std::vector<int>& widths) {
  std::vector<std::unique_ptr<Lane>> lanes;
  for (int width : widths) lanes.push_back(make_lane(width));
  return lanes;
}

std::unique_ptr<Graph> Backend::capture(Lane&, std::function<void()> enqueue) {
  return std::make_unique<Recall>(std::move(enqueue));
}

std::vector<std::shared_ptr<Backend>> make_backends(const BackendOptions& options, int ranks) {
  NF_CHECK(ranks >= 1 && options.simulated_ranks >= 0, "there cannot be ", ranks, " ranks, or ",
           options.simulated_ranks, " simulated ones");
  NF_CHECK(options.simulated_ranks == 0 || ranks == 1, "one of ", options.simulated_ranks,
           " ranks is simulated without the others, not ", ranks, " of them");
  if (options.device.kind == Device::Kind::kCpu) return make_cpu_backends(options, ranks);
  std::vector<std::shared_ptr<Backend>> backends;
  open_cuda_library(options.device).make_backends(options, ranks, backends);
  return backends;
}

std::shared_ptr<Backend> make_backend(const BackendOptions& options) {
  return make_backends(options, 1).front();
}

std::string cuda_problem(int index) {
  try {
    std::string problem;
    open_cuda_library({Device::Kind::kCuda, index}).find_problem(index, problem);
    return problem;
  } catch (const std::exception& error) {
    return error.what();
  }
}

std::string cuda_bus_id(int index) {
  std::string id;
  open_cuda_library({Device::Kind::kCuda, index}).find_bus_id(index, id);
  return id;
}

}  // namespace nanoflow
