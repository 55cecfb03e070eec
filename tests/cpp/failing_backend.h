#pragma once

#include <atomic>
#include <memory>
#include <stdexcept>

#include "core/error.h"
#include "kernels/backend.h"
#include "kernels/cpu/lane.h"

namespace nanoflow::testing {

/// The CPU backend, whose copies fail on their lane while `fails`, and whose new events report an
/// error while `events_fail`, as those of a GPU do for good after a fault.
class FailingBackend : public Backend {
 public:
  std::atomic<bool> fails = false, events_fail = false;

  Device device() const override { return cpu_->device(); }
  std::string description() const override { return "failing"; }
  int width() const override { return cpu_->width(); }
  int row_granularity() const override { return cpu_->row_granularity(); }
  size_t total_memory() const override { return cpu_->total_memory(); }
  size_t free_memory() const override { return cpu_->free_memory(); }
  Buffer allocate(size_t bytes) override { return cpu_->allocate(bytes); }
  Buffer allocate_host(size_t bytes) override { return cpu_->allocate_host(bytes); }
  std::unique_ptr<Lane> make_lane(int width) override { return cpu_->make_lane(width); }
  std::unique_ptr<Event> make_event() override {
    if (events_fail) fail("gone for good");
    return cpu_->make_event();
  }
  void copy(void* to, const void* from, size_t bytes, Lane& lane) override {
    if (fails) {
      cpu::cpu_lane(lane).enqueue([](const cpu::Worker&) { throw std::runtime_error("planted"); });
    }
    cpu_->copy(to, from, bytes, lane);
  }
  Kernels& kernels() override { return cpu_->kernels(); }
  Communicator& communicator() override { return cpu_->communicator(); }

 private:
  std::shared_ptr<Backend> cpu_ = make_backend({.device = {}, .threads = 2, .isa = "auto"});
};

}  // namespace nanoflow::testing
