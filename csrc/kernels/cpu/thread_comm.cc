#include "kernels/cpu/thread_comm.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/lane.h"
#include "kernels/cpu/math_loops.h"
#include "kernels/meeting.h"
#include "kernels/shapes.h"

namespace nanoflow::cpu {
namespace {

constexpr int64_t kGrain = 64;  // values: whole cache lines of any dtype
/// Fewer rows than so many a rank are not shared out whole: sums would wait for few of the threads.
constexpr int64_t kLeastRows = 4;

/// What a rank brings to a collective.
struct Part {
  std::string_view op;
  Tensor x;
  Tensor normed = {};  // of an AllReduce
};

struct Group {
  explicit Group(int size) : meeting(size), parts(static_cast<size_t>(size)) {}

  Meeting meeting;
  std::vector<Part> parts;  // by rank; written before a meeting, read after it
};

void check_alike(const std::vector<Part>& parts, int rank) {
  const Part& own = parts[rank];
  for (const Part& part : parts) {
    NF_CHECK(
        part.op == own.op && part.x.dtype() == own.x.dtype() && part.x.size(0) == own.x.size(0) &&
            part.x.size(1) == own.x.size(1) && bool{part.normed} == bool{own.normed},
        "ranks do not agree: one runs ", part.op, " of ", part.x, part.normed ? ", normed" : "",
        ", rank ", rank, " ", own.op, " of ", own.x, own.normed ? ", normed" : "");
  }
}

template <typename T>
void sum(const std::vector<Part>& parts, int64_t begin, int64_t end) {
  for (; begin < end; begin += kGrain) {
    const int64_t count = std::min(kGrain, end - begin);
    float sums[kGrain] = {};
    for (const Part& part : parts) {
      const T* values = part.x.data<T>() + begin;
      for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<float>(values[i]);
    }
    for (const Part& part : parts) {
      T* values = part.x.data<T>() + begin;
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(sums[i]);
    }
  }
}

/// Sums a row of all ranks, norms it, and gives all of them both.
template <typename T>
void sum_and_norm(const std::vector<Part>& parts, const RmsNorm& op, const PointwiseLoops& loops,
                  int64_t row) {
  const int64_t columns = op.x.size(1);
  sum<T>(parts, row * columns, (row + 1) * columns);
  norm_row(op, loops, row);
  const std::byte* const normed = op.out.select(0, row).bytes();
  for (const Part& part : parts) {
    std::byte* const to = part.normed.select(0, row).bytes();
    if (to != normed) std::memcpy(to, normed, static_cast<size_t>(columns) * sizeof(T));
  }
}

/// Rows [begin, end) of all ranks' parts, side by side.
void gather(const std::vector<Part>& parts, const Tensor& out, int64_t begin, int64_t end) {
  int64_t column = 0;
  for (const Part& part : parts) {
    const int64_t next = std::min(column + part.x.size(1), out.size(1));
    const Tensor to = out.slice_columns(column, next);
    const auto bytes = static_cast<size_t>(next - column) * size_of(out.dtype());
    for (int64_t row = begin; row < end; ++row) {
      const std::byte* source = part.x.select(0, row).bytes();
      std::byte* target = to.select(0, row).bytes();
      if (source != target) std::memcpy(target, source, bytes);
    }
    column = next;
  }
}

/// Every collective is a meeting, in which all ranks say where their data lie, the work, in which
/// every rank does its share, and another meeting, after which the data may be overwritten.
class ThreadCommunicator : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<Group> group, int rank, Isa isa)
      : group_(std::move(group)), rank_(rank), isa_(isa) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(group_->parts.size()); }

  bool norms_sums() const override { return true; }

  void run(const AllReduce& op, Lane& lane) override {
    if (op.norm && op.x.size(0) >= kLeastRows * size()) return sum_rows(*op.norm, lane);
    const Tensor normed = op.norm ? op.norm->out : Tensor();
    enqueue({AllReduce::kName, op.x, normed}, lane, [this, x = op.x](const Worker& worker) {
      const int64_t count = x.numel(), grains = (count + kGrain - 1) / kGrain;
      const int64_t first = std::min(count, grains * rank_ / size() * kGrain);
      const int64_t last = std::min(count, grains * (rank_ + 1) / size() * kGrain);
      const auto [begin, end] = worker.share(last - first, kGrain);
      dispatch_float(x.dtype(), AllReduce::kName, [&, begin = begin, end = end](auto tag) {
        sum<typename decltype(tag)::type>(group_->parts, first + begin, first + end);
      });
    });
    if (op.norm) norm_rows(*op.norm, loops_of(*op.norm), lane);  // all rows, each rank for itself
  }

  void run(const AllGather& op, Lane& lane) override {
    enqueue({AllGather::kName, op.x}, lane, [this, out = op.out](const Worker& worker) {
      const auto [begin, end] = worker.share(out.size(0));
      gather(group_->parts, out, begin, end);
    });
  }

  std::exception_ptr abort(std::exception_ptr cause) override {
    return group_->meeting.abort(std::move(cause));
  }
  std::exception_ptr cause() const override { return group_->meeting.cause(); }

 private:
  const PointwiseLoops& loops_of(const RmsNorm& op) const {
    return loop_set(isa_).of(op.x.dtype(), AllReduce::kName).pointwise;
  }

  /// Ranks share out whole rows, and norm them as well.
  void sum_rows(const RmsNorm& op, Lane& lane) {
    const PointwiseLoops& loops = loops_of(op);
    enqueue({AllReduce::kName, op.x, op.out}, lane, [this, op, &loops](const Worker& worker) {
      const int64_t rows = op.x.size(0), first = rows * rank_ / size();
      const auto [begin, end] = worker.share(rows * (rank_ + 1) / size() - first);
      dispatch_float(op.x.dtype(), AllReduce::kName, [&, begin = begin, end = end](auto tag) {
        for (int64_t row = begin; row < end; ++row) {
          sum_and_norm<typename decltype(tag)::type>(group_->parts, op, loops, first + row);
        }
      });
    });
  }

  void enqueue(const Part& part, Lane& lane, std::function<void(const Worker&)> work) {
    CpuLane& own = cpu_lane(lane);
    own.enqueue_alone([this, part](std::exception_ptr& error) {
      if (error == nullptr) group_->parts[rank_] = part;
      meet(error);
      if (error == nullptr) check_alike(group_->parts, rank_);
    });
    own.enqueue(std::move(work));
    own.enqueue_alone([this](std::exception_ptr& error) { meet(error); });
  }

  /// A lane that has failed takes the others with it, as it will never do its share.
  void meet(std::exception_ptr& error) {
    if (error == nullptr) {
      group_->meeting.wait();
    } else {
      group_->meeting.abort(error);
    }
  }

  std::shared_ptr<Group> group_;
  int rank_;
  Isa isa_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> make_thread_communicators(int size, Isa isa) {
  const auto group = std::make_shared<Group>(size);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.push_back(std::make_unique<ThreadCommunicator>(group, rank, isa));
  }
  return ranks;
}

void CpuKernels::run(const AllReduce& op, Lane& lane) {
  check_shapes(op, communicator_->norms_sums());
  dispatch_float(op.x.dtype(), AllReduce::kName, [](auto) {});  // throws
  communicator_->run(op, lane);
}

void CpuKernels::run(const AllGather& op, Lane& lane) {
  check_shapes(op, communicator_->size());
  communicator_->run(op, lane);
}

}  // namespace nanoflow::cpu
