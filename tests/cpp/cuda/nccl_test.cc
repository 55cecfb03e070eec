#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <chrono>
#include <future>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "kernels/backend.h"
#include "kernels/cuda/check.h"

// Collectives of a rank alone, but through NCCL, on the lane of a partition and in a graph. What
// several GPUs do is tested from Python.

using namespace nanoflow;

namespace {

/// Null where there is no GPU, or no libnccl.so.2 where the system looks for one.
std::shared_ptr<Backend> gpu_with_nccl() {
  try {
    return make_backend({.device = parse_device("cuda"), .nccl_library = "", .nccl_alone = true});
  } catch (const Error& error) {
    MESSAGE("not tested: ", std::string(error.what()));
    return nullptr;
  }
}

std::vector<float> values_of(const Tensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.numel()));
  NF_CUDA_CHECK(cudaMemcpy(values.data(), tensor.bytes(), tensor.span_bytes(), cudaMemcpyDefault));
  return values;
}

}  // namespace

TEST_CASE("collectives through NCCL are replayed from a graph") {
  const auto backend = gpu_with_nccl();
  if (backend == nullptr) return;
  const auto origin = backend->make_lane(backend->width());
  const auto lanes = backend->make_lanes({backend->width() - 16, 16});
  Lane& network = *lanes[1];
  backend->communicator().prepare(network.width());
  constexpr int64_t kRows = 48, kColumns = 264;
  const Buffer memory = backend->allocate(3 * kRows * kColumns * sizeof(float));
  const auto matrix = [&](int index) {
    return Tensor(memory.data() + index * kRows * kColumns * sizeof(float), DType::kF32,
                  backend->device(), {kRows, kColumns});
  };
  const Tensor x = matrix(0), out = matrix(1), work = matrix(2);
  std::vector<float> values(static_cast<size_t>(x.numel()));
  std::iota(values.begin(), values.end(), 1.0f);
  NF_CUDA_CHECK(cudaMemcpy(x.bytes(), values.data(), x.span_bytes(), cudaMemcpyDefault));

  const auto forked = backend->make_event(), joined = backend->make_event();
  const auto run = [&] {
    origin->record(*forked);
    network.wait(*forked);
    backend->kernels().run(AllReduce{.x = x}, network);
    backend->kernels().run(AllGather{.x = x, .out = out, .work = work}, network);
    network.record(*joined);
    origin->wait(*joined);
  };
  const auto finish = [&] {
    origin->record(*joined);
    joined->synchronize();
  };
  run();
  finish();
  CHECK(values_of(out) == values);
  NF_CUDA_CHECK(cudaMemset(out.bytes(), 0, out.span_bytes()));
  const auto graph = backend->capture(*origin, run);
  for (int launch = 0; launch < 3; ++launch) graph->launch(*origin);
  finish();
  CHECK(values_of(x) == values);
  CHECK(values_of(out) == values);
}

TEST_CASE("what was aborted stays so") {
  const auto backend = gpu_with_nccl();
  if (backend == nullptr) return;
  const auto lane = backend->make_lane(8);
  backend->communicator().prepare(lane->width());
  backend->communicator().abort(std::make_exception_ptr(Error("trouble elsewhere")));
  const Buffer memory = backend->allocate(64);
  const Tensor x(memory.data(), DType::kF32, backend->device(), {1, 16});
  CHECK_THROWS_WITH_AS(backend->kernels().run(AllReduce{.x = x}, *lane), "trouble elsewhere",
                       Error);
}

TEST_CASE("an abort does not wait for the graphs of collectives") {
  const auto backend = gpu_with_nccl();
  if (backend == nullptr) return;
  const auto lane = backend->make_lane(8);
  backend->communicator().prepare(lane->width());
  const Buffer memory = backend->allocate(64);
  const Tensor x(memory.data(), DType::kF32, backend->device(), {1, 16});
  NF_CUDA_CHECK(cudaMemset(x.bytes(), 0, x.span_bytes()));
  const auto run = [&] { backend->kernels().run(AllReduce{.x = x}, *lane); };
  run();  // what connects the ranks is not captured
  const auto graph = backend->capture(*lane, run);
  graph->launch(*lane);
  std::promise<void> returned;
  std::future<void> done = returned.get_future();
  std::thread([backend, returned = std::move(returned)]() mutable {
    backend->communicator().abort(std::make_exception_ptr(Error("trouble elsewhere")));
    returned.set_value();
  }).detach();
  CHECK(done.wait_for(std::chrono::seconds(30)) == std::future_status::ready);
  CHECK_THROWS_WITH_AS(run(), "trouble elsewhere", Error);
}
