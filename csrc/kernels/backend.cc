#include "kernels/backend.h"

#include <dlfcn.h>

#include <filesystem>
#include <utility>

#include "core/error.h"

namespace nanoflow {
namespace {

constexpr const char* kCudaLibrary = "libnanoflow_cuda.so";
constexpr const char* kCudaFactory = "nanoflow_make_cuda_backend";
using CudaFactory = void(const BackendOptions&, std::shared_ptr<Backend>&);

/// Opens the CUDA backend's library, which lies beside this one and stays open for good: backends
/// outlive this call.
std::shared_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  Dl_info self;
  NF_CHECK(dladdr(reinterpret_cast<const void*>(&make_backend), &self) != 0,
           "cannot tell where nanoflow's core library lies");
  const auto path = std::filesystem::path(self.dli_fname).parent_path() / kCudaLibrary;
  NF_CHECK(std::filesystem::exists(path), "device '", options.device,
           "' needs nanoflow's CUDA backend, which this build does not contain; reinstall with "
           "pip install -C cmake.define.NANOFLOW_CUDA=ON on a machine with the CUDA toolkit 13.0, "
           "or use device='cpu'");
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  NF_CHECK(library != nullptr, "cannot open nanoflow's CUDA backend: ", dlerror());
  auto* factory = reinterpret_cast<CudaFactory*>(dlsym(library, kCudaFactory));
  NF_CHECK(factory != nullptr, path.string(), " is not nanoflow's CUDA backend: ", dlerror());
  std::shared_ptr<Backend> backend;
  factory(options, backend);
  return backend;
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

size_t Backend::attention_work_bytes(int, int, int, int) const { return 0; }

std::vector<std::unique_ptr<Lane>> Backend::make_lanes(const std::vector<int>& widths) {
  std::vector<std::unique_ptr<Lane>> lanes;
  for (int width : widths) lanes.push_back(make_lane(width));
  return lanes;
}

std::unique_ptr<Graph> Backend::capture(Lane&, std::function<void()> enqueue) {
  return std::make_unique<Recall>(std::move(enqueue));
}

std::shared_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device.kind == Device::Kind::kCpu) return make_cpu_backend(options);
  return make_cuda_backend(options);
}

}  // namespace nanoflow
