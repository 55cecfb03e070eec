#include <algorithm>
#include <cstring>

#include "kernels/cpu/lane.h"
#include "kernels/cpu/thread_comm.h"

namespace nanoflow::cpu {
namespace {

class CopyCommunicator : public Communicator {
 public:
  explicit CopyCommunicator(int size) : size_(size) {}

  int rank() const override { return 0; }
  int size() const override { return size_; }
  int members() const override { return 1; }

  /// The lane's threads copy its data once to scratch and back.
  void run(const AllReduce& op, Lane& lane) override {
    const size_t bytes = op.x.span_bytes();
    cpu_lane(lane).enqueue(
        [x = op.x.bytes(), bytes](const Worker& worker) {
          const auto [begin, end] = worker.share(static_cast<int64_t>(bytes), 64);
          const auto count = static_cast<size_t>(end - begin);
          std::memcpy(worker.scratch() + begin, x + begin, count);
          std::memcpy(x + begin, worker.scratch() + begin, count);
        },
        bytes);
  }

  void run(const AllGather& op, Lane& lane) override {
    cpu_lane(lane).enqueue([x = op.x, out = op.out](const Worker& worker) {
      const auto [begin, end] = worker.share(out.size(0));
      for (int64_t column = 0; column < out.size(1); column += x.size(1)) {
        const Tensor to = out.slice_columns(column, std::min(column + x.size(1), out.size(1)));
        const auto bytes = static_cast<size_t>(to.size(1)) * size_of(out.dtype());
        for (int64_t row = begin; row < end; ++row) {
          std::memmove(to.select(0, row).bytes(), x.select(0, row).bytes(), bytes);
        }
      }
    });
  }

  std::exception_ptr abort(std::exception_ptr cause) override { return cause; }
  std::exception_ptr cause() const override { return nullptr; }

 private:
  int size_;
};

}  // namespace

std::unique_ptr<Communicator> make_copy_communicator(int size) {
  return std::make_unique<CopyCommunicator>(size);
}

}  // namespace nanoflow::cpu
