#pragma once

#include <memory>

#include "kernels/backend.h"

namespace nanoflow::testing {

/// The CPU backend, with memory that claims to lie on another device: what is for a device then
/// takes the way to a device.
class AwayBackend : public Backend {
 public:
  Device device() const override { return {Device::Kind::kCuda, 0}; }
  std::string description() const override { return "away"; }
  int width() const override { return cpu_->width(); }
  int row_granularity() const override { return cpu_->row_granularity(); }
  size_t total_memory() const override { return cpu_->total_memory(); }
  size_t free_memory() const override { return cpu_->free_memory(); }
  Buffer allocate(size_t bytes) override {
    auto memory = std::make_shared<Buffer>(cpu_->allocate(bytes));
    return Buffer(memory->data(), bytes, device(), [memory](void*) {});
  }
  Buffer allocate_host(size_t bytes) override { return cpu_->allocate_host(bytes); }
  std::unique_ptr<Lane> make_lane(int width) override { return cpu_->make_lane(width); }
  std::unique_ptr<Event> make_event() override { return cpu_->make_event(); }
  void copy(void* to, const void* from, size_t bytes, Lane& lane) override {
    cpu_->copy(to, from, bytes, lane);
  }
  Kernels& kernels() override { return cpu_->kernels(); }
  Communicator& communicator() override { return cpu_->communicator(); }

 private:
  std::shared_ptr<Backend> cpu_ = make_backend({.device = {}, .threads = 2, .isa = "auto"});
};

}  // namespace nanoflow::testing
