#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace nanoflow::testing {

/// A backend that computes nothing and writes down what it is told, in order of the calls:
/// "compute: gemm", "memory: wait e3", "origin: record e0". Lanes are numbered in order of
/// creation.
class RecordingBackend : public Backend {
 public:
  explicit RecordingBackend(int width = 8) : width_(width), kernels_(*this) {}

  std::vector<std::string> log;
  std::vector<std::string> ranges;  // that have ended

  Device device() const override { return {}; }
  std::string description() const override { return "recording"; }
  int width() const override { return width_; }
  int row_granularity() const override { return 1; }
  size_t total_memory() const override { return size_t{1} << 30; }
  size_t free_memory() const override { return size_t{1} << 30; }
  Buffer allocate(size_t bytes) override {
    return Buffer(std::calloc(bytes, 1), bytes, {}, [](void* data) { std::free(data); });
  }
  Buffer allocate_host(size_t bytes) override { return allocate(bytes); }
  std::unique_ptr<Lane> make_lane(int width) override {
    return std::make_unique<RecordingLane>(*this, lanes_++, width);
  }
  std::unique_ptr<Event> make_event() override {
    return std::make_unique<RecordingEvent>("e" + std::to_string(events_++));
  }
  void copy(void*, const void*, size_t, Lane& lane) override { note(lane, "copy"); }
  Kernels& kernels() override { return kernels_; }
  Communicator& communicator() override { return cpu_->communicator(); }

 private:
  struct RecordingEvent : Event {
    explicit RecordingEvent(std::string name) : name(std::move(name)) {}
    void synchronize() override {}
    std::string name;
  };

  struct RecordingLane : Lane {
    RecordingLane(RecordingBackend& backend, int index, int width)
        : backend(backend), index(index), lane_width(width) {}
    int width() const override { return lane_width; }
    void wait(Event& event) override {
      backend.note(*this, "wait " + static_cast<RecordingEvent&>(event).name);
    }
    void record(Event& event) override {
      backend.note(*this, "record " + static_cast<RecordingEvent&>(event).name);
    }
    void notify(std::function<void(std::exception_ptr)> fn) override { fn(nullptr); }
    void stamp(int64_t* ns) override { *ns = 0; }
    void delay(std::chrono::microseconds) override { backend.note(*this, "delay"); }
    void clear_error() override {}
    void begin_range(const char* name) override { range = name; }
    void end_range() override { backend.ranges.push_back(range); }
    RecordingBackend& backend;
    int index, lane_width;
    std::string range;
  };

  struct RecordingKernels : Kernels {
    explicit RecordingKernels(RecordingBackend& backend) : backend(backend) {}
    void run(const Embed& op, Lane& lane) override { add(op, lane); }
    void run(const RmsNorm& op, Lane& lane) override { add(op, lane); }
    void run(const Gemm& op, Lane& lane) override { add(op, lane); }
    void run(const GemmSiluMul& op, Lane& lane) override { add(op, lane); }
    void run(const RopeAppend& op, Lane& lane) override { add(op, lane); }
    void run(const Attention& op, Lane& lane) override { add(op, lane); }
    void run(const GatherRows& op, Lane& lane) override { add(op, lane); }
    void run(const Sample& op, Lane& lane) override { add(op, lane); }
    void run(const FillNormal& op, Lane& lane) override { add(op, lane); }
    void run(const Penalize& op, Lane& lane) override { add(op, lane); }
    void run(const AddBias& op, Lane& lane) override { add(op, lane); }
    void run(const MaskLogits& op, Lane& lane) override { add(op, lane); }
    void run(const RecordSamples& op, Lane& lane) override { add(op, lane); }
    void run(const Logprobs& op, Lane& lane) override { add(op, lane); }
    void run(const RouteExperts& op, Lane& lane) override { add(op, lane); }
    void run(const SortByExpert& op, Lane& lane) override { add(op, lane); }
    void run(const GroupedGemm& op, Lane& lane) override { add(op, lane); }
    void run(const GroupedGemmSiluMul& op, Lane& lane) override { add(op, lane); }
    void run(const CombineExperts& op, Lane& lane) override { add(op, lane); }
    void run(const AllReduce& op, Lane& lane) override { add(op, lane); }
    void run(const AllGather& op, Lane& lane) override { add(op, lane); }
    void add(const auto& op, Lane& lane) { backend.note(lane, std::string(op.kName)); }
    RecordingBackend& backend;
  };

  void note(Lane& lane, const std::string& what) {
    log.push_back("lane" + std::to_string(static_cast<RecordingLane&>(lane).index) + ": " + what);
  }

  int width_;
  int lanes_ = 0, events_ = 0;
  std::shared_ptr<Backend> cpu_ = make_backend({.device = {}, .threads = 1, .isa = "generic"});
  RecordingKernels kernels_;
};

}  // namespace nanoflow::testing
