#include "kernels/backend.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "core/error.h"
#include "kernels/cpu/host.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/lane.h"
#include "kernels/cpu/thread_comm.h"

namespace nanoflow {
namespace cpu {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int64_t kSharedCopy = 256 << 10;  // bytes from which all threads of a lane copy
constexpr int64_t kCopyGrain = 4096;

class CpuBackend : public Backend {
 public:
  CpuBackend(int width, Isa isa, std::unique_ptr<Communicator> communicator)
      : width_(width), isa_(isa), kernels_(isa, std::move(communicator)) {}

  Device device() const override { return Device{}; }
  std::string description() const override {
    std::ostringstream text;
    text << "cpu (" << width_ << (width_ == 1 ? " thread, " : " threads, ") << to_string(isa_)
         << ")";
    return text.str();
  }
  int width() const override { return width_; }
  int row_granularity() const override { return 4; }
  size_t total_memory() const override { return physical_memory(); }
  size_t free_memory() const override { return available_memory(); }
  Buffer allocate(size_t bytes) override { return allocate_memory(bytes); }
  Buffer allocate_host(size_t bytes) override { return allocate_memory(bytes); }

  std::unique_ptr<Lane> make_lane(int width) override {
    NF_CHECK(width >= 1 && width <= kMaxThreads, "a CPU lane has 1 to ", kMaxThreads,
             " threads, not ", width);
    return std::make_unique<CpuLane>(width);
  }
  std::unique_ptr<Event> make_event() override { return make_cpu_event(); }

  void copy(void* to, const void* from, size_t bytes, Lane& lane) override {
    if (bytes == 0) return;
    cpu_lane(lane).enqueue([=](const Worker& worker) {
      const auto count = static_cast<int64_t>(bytes);
      const auto [begin, end] = worker.share(count, count < kSharedCopy ? count : kCopyGrain);
      std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                  static_cast<size_t>(end - begin));
    });
  }

  Kernels& kernels() override { return kernels_; }
  Communicator& communicator() override { return kernels_.communicator(); }

 private:
  int width_;
  Isa isa_;
  CpuKernels kernels_;
};

}  // namespace
}  // namespace cpu

std::vector<std::shared_ptr<Backend>> make_cpu_backends(const BackendOptions& options, int ranks) {
  NF_CHECK(options.threads >= 0 && options.threads <= cpu::kMaxThreads, "threads is ",
           options.threads, " but must be 0 (all cores) to ", cpu::kMaxThreads);
  const int width = options.threads > 0 ? options.threads : cpu::usable_cores();
  const cpu::Isa isa = cpu::parse_isa(options.isa);
  std::vector<std::unique_ptr<Communicator>> communicators;
  if (options.simulated_ranks > 0) {
    communicators.push_back(cpu::make_copy_communicator(options.simulated_ranks));
  } else {
    communicators = cpu::make_thread_communicators(ranks, isa);
  }
  std::vector<std::shared_ptr<Backend>> backends;
  for (std::unique_ptr<Communicator>& communicator : communicators) {
    backends.push_back(std::make_shared<cpu::CpuBackend>(std::max(1, width / ranks), isa,
                                                         std::move(communicator)));
  }
  return backends;
}

}  // namespace nanoflow
