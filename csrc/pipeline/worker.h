#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "model/decoder.h"
#include "pipeline/engine.h"
#include "pipeline/executor.h"
#include "pipeline/kv_cache.h"
#include "pipeline/workspace.h"

namespace nanoflow {

/// What a StepHandle shares with the worker. `result` is written before `done` and read after it.
class StepState {
 public:
  uint64_t step = 0;
  Batch batch;
  std::shared_ptr<const Schedule> schedule;
  std::shared_ptr<const Plan> plan;
  Buffer stamps;  // two int64 a NanoOp, nanoseconds, where the batch asks for timings
  StepResult result;

  void finish(std::exception_ptr error);
  bool is_done() const;
  void wait() const;  // rethrows the error

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool done_ = false;
  std::exception_ptr error_;
};

/// One rank: its KV cache, workspace and executor, and the thread that issues steps in order.
class Worker {
 public:
  Worker(const EngineConfig& config, std::shared_ptr<Weights> weights);
  /// Finishes what is queued.
  ~Worker();

  /// Queues a validated step. At most kMaxStepsInFlight may be unfinished.
  void enqueue(std::shared_ptr<StepState> state);
  uint64_t completed_steps() const { return completed_.load(std::memory_order_acquire); }
  /// The first error of any step; later steps are refused.
  std::exception_ptr error() const;

  const Workspace& workspace() const { return workspace_; }
  /// Builds and validates; throws Error naming every finding. Any thread.
  std::shared_ptr<const Plan> build(const Schedule& schedule, const PlanKey& key) const;

 private:
  static constexpr size_t kCachedPlans = 128;

  void loop();
  void issue(const std::shared_ptr<StepState>& state);
  std::shared_ptr<const Plan> cached_plan(const std::shared_ptr<const Schedule>& schedule,
                                          const PlanKey& key);
  void complete(StepState& state, int ring, std::exception_ptr error);

  EngineConfig config_;
  std::shared_ptr<Weights> weights_;
  Backend& backend_;
  KvCache cache_;
  Workspace workspace_;
  Decoder decoder_;
  Executor executor_;
  std::unique_ptr<Lane> origin_;  // orders steps: copies in, fork and join, copies out
  std::array<Buffer, Engine::kMaxStepsInFlight> sampled_host_;

  using CachedPlan = std::pair<PlanKey, std::shared_ptr<const Plan>>;
  std::shared_ptr<const Schedule> cached_schedule_;  // of all cached plans
  std::list<CachedPlan> plans_;                      // most recently used first
  std::map<PlanKey, std::list<CachedPlan>::iterator> plan_index_;

  std::atomic<uint64_t> completed_{0};
  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::deque<std::shared_ptr<StepState>> queue_;
  std::exception_ptr error_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace nanoflow
