#include "pipeline/executor.h"

#include <chrono>

namespace nanoflow {
namespace {

/// Names what is enqueued while it lives.
class Range {
 public:
  Range(Lane& lane, const std::string& name) : lane_(lane) { lane_.begin_range(name.c_str()); }
  Range(const Range&) = delete;
  ~Range() { lane_.end_range(); }

 private:
  Lane& lane_;
};

}  // namespace

Executor::Executor(Backend& backend, int jitter_us)
    : backend_(backend),
      jitter_us_(jitter_us),
      random_(static_cast<unsigned>(backend.communicator().rank()) + 1),  // delays of its own
      forked_(backend.make_event()) {}

std::vector<Lane*> Executor::lanes_of(const std::vector<int>& widths, Lane& origin) {
  if (widths == std::vector<int>{origin.width()}) return {&origin};
  std::vector<std::unique_ptr<Lane>>& own = lanes_[widths];
  if (own.empty()) own = backend_.make_lanes(widths);
  std::vector<Lane*> lanes;
  for (const std::unique_ptr<Lane>& lane : own) lanes.push_back(lane.get());
  return lanes;
}

std::vector<Lane*> Executor::lanes() const {
  std::vector<Lane*> lanes;
  for (const auto& [widths, own] : lanes_) {
    for (const std::unique_ptr<Lane>& lane : own) lanes.push_back(lane.get());
  }
  return lanes;
}

void Executor::make_events(const Plan& plan) {
  if (finished_.size() < plan.ops.size()) finished_.resize(plan.ops.size());
  while (joined_.size() < plan.lanes.size()) joined_.push_back(backend_.make_event());
  for (const NanoOp& n : plan.ops) {
    if (n.is_awaited && finished_[n.id] == nullptr) finished_[n.id] = backend_.make_event();
  }
}

void Executor::jitter(Lane& lane) {
  if (jitter_us_ == 0) return;
  lane.delay(std::chrono::microseconds(random_() % static_cast<unsigned>(jitter_us_)));
}

void Executor::run(const Plan& plan, Lane& origin, int64_t* stamps) {
  make_events(plan);
  std::vector<int> widths;
  for (const LaneSpec& lane : plan.lanes) widths.push_back(lane.width);
  const std::vector<Lane*> lanes = lanes_of(widths, origin);
  const bool is_forked = lanes.front() != &origin;
  jitter(origin);
  if (is_forked) origin.record(*forked_);
  for (size_t i = 0; is_forked && i < lanes.size(); ++i) {
    lanes[i]->wait(*forked_);
    jitter(*lanes[i]);
  }
  Kernels& kernels = backend_.kernels();
  for (const NanoOp& n : plan.ops) {
    Lane& lane = *lanes[n.lane];
    const Range range(lane, n.name);
    for (OpId dep : n.deps) {
      jitter(lane);
      lane.wait(*finished_[dep]);
    }
    if (stamps != nullptr) lane.stamp(&stamps[2 * n.id]);
    std::visit([&](const auto& op) { kernels.run(op, lane); }, n.op);
    if (stamps != nullptr) lane.stamp(&stamps[2 * n.id + 1]);
    if (n.is_awaited) {
      jitter(lane);
      lane.record(*finished_[n.id]);
    }
  }
  for (size_t i = 0; is_forked && i < lanes.size(); ++i) {
    jitter(*lanes[i]);
    lanes[i]->record(*joined_[i]);
    origin.wait(*joined_[i]);
  }
  jitter(origin);
}

}  // namespace nanoflow
