#include "kernels/cpu/lane.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

#include "core/error.h"
#include "kernels/cpu/team.h"

namespace nanoflow::cpu {
namespace {

/// One record of an event. Each record makes a new one, so a wait keeps the record it was queued
/// behind however often the event is recorded later.
struct Record {
  Gate reached;              // advances once
  std::exception_ptr error;  // of the recording lane; read only once reached

  void reach(const std::exception_ptr& lane_error) {
    error = lane_error;
    reached.advance();
  }
};

class CpuEvent : public Event {
 public:
  void synchronize() override {
    const std::shared_ptr<Record> record = latest();
    if (!record) return;
    record->reached.sleep_until_change(0);
    if (record->error) std::rethrow_exception(record->error);
  }

  /// The latest record queued; null before the first.
  std::shared_ptr<Record> latest() const {
    const std::lock_guard lock(mutex_);
    return latest_;
  }

  void set_latest(std::shared_ptr<Record> record) {
    const std::lock_guard lock(mutex_);
    latest_ = std::move(record);
  }

 private:
  mutable std::mutex mutex_;  // one thread may synchronize while another records again
  std::shared_ptr<Record> latest_;
};

CpuEvent& cpu_event(Event& event) {
  auto* own = dynamic_cast<CpuEvent*>(&event);
  NF_CHECK(own != nullptr, "a CPU lane got an event of another backend");
  return *own;
}

}  // namespace

void Worker::sync() const { team_.sync(); }

Worker::Range Worker::share(int64_t count, int64_t grain) const {
  const int64_t grains = (count + grain - 1) / grain;
  return {std::min(count, grains * index_ / width_ * grain),
          std::min(count, grains * (index_ + 1) / width_ * grain)};
}

int64_t Worker::claim() const {
  return claims_ == nullptr ? team_.claim() : claims_->fetch_add(1, std::memory_order_relaxed);
}

std::byte* Worker::scratch() const { return team_.scratch() + scratch_begin_; }

Worker Worker::part(std::atomic<int64_t>& claims, size_t scratch_begin) const {
  Worker part = *this;
  part.claims_ = &claims;
  part.scratch_begin_ = scratch_begin_ + scratch_begin;
  return part;
}

CpuLane::CpuLane(int width) : team_(std::make_unique<Team>(width)) {}

CpuLane::~CpuLane() = default;

void CpuLane::enqueue(std::function<void(const Worker&)> fn, size_t scratch_bytes) {
  team_->run_together(std::move(fn), scratch_bytes);
}

void CpuLane::enqueue_alone(std::function<void(std::exception_ptr&)> fn) {
  team_->run_alone(std::move(fn));
}

int CpuLane::width() const { return team_->width(); }

void CpuLane::wait(Event& event) {
  std::shared_ptr<Record> record = cpu_event(event).latest();
  if (!record) return;
  team_->run_alone(
      [record = std::move(record), &spin = team_->event_spin()](std::exception_ptr& error) {
        record->reached.await_change(0, spin);
        if (!error) error = record->error;
      });
}

void CpuLane::record(Event& event) {
  auto record = std::make_shared<Record>();
  cpu_event(event).set_latest(record);
  team_->run_alone(
      [record = std::move(record)](std::exception_ptr& error) { record->reach(error); });
}

void CpuLane::notify(std::function<void(std::exception_ptr)> fn) {
  team_->run_alone([fn = std::move(fn)](std::exception_ptr& error) { fn(error); });
}

void CpuLane::stamp(int64_t* ns) {
  team_->run_alone([ns](std::exception_ptr&) {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    *ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  });
}

void CpuLane::delay(std::chrono::microseconds time) {
  team_->run_alone([time](std::exception_ptr& error) {
    if (!error) std::this_thread::sleep_for(time);
  });
}

void CpuLane::clear_error() {
  team_->run_alone([](std::exception_ptr& error) { error = nullptr; });
}

CpuLane& cpu_lane(Lane& lane) {
  auto* own = dynamic_cast<CpuLane*>(&lane);
  NF_CHECK(own != nullptr, "a CPU kernel got a lane of another backend");
  return *own;
}

std::unique_ptr<Event> make_cpu_event() { return std::make_unique<CpuEvent>(); }

}  // namespace nanoflow::cpu
