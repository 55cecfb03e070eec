#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "model/decoder.h"
#include "pipeline/completion.h"
#include "pipeline/engine.h"
#include "pipeline/executor.h"
#include "pipeline/host_pool.h"
#include "pipeline/kv_cache.h"
#include "pipeline/plan_cache.h"
#include "pipeline/workspace.h"

namespace nanoflow {

/// What a StepHandle shares with the workers of all ranks. `result`, and what it is made from, is
/// rank 0's alone; it is written before it is done and read after.
class StepState : public Completion {
 public:
  explicit StepState(int ranks = 1) : Completion(ranks) {}

  uint64_t step = 0;
  Batch batch;
  std::shared_ptr<const Schedule> schedule;
  std::vector<std::shared_ptr<const Plan>> plans;  // where the batch asks for timings
  Buffer stamps;  // two int64 a NanoOp of the plans, nanoseconds, likewise
  StepResult result;
};

/// One rank: its KV cache, workspace and executor, and the thread that issues steps in order.
class Worker {
 public:
  /// See Engine. `completed`: steps that earlier workers of the engine have run.
  Worker(const EngineConfig& config, std::shared_ptr<Weights> weights, const Schedule& schedule,
         const std::function<int()>& choose_pages, uint64_t completed = 0);
  ~Worker();

  /// Ends the thread once all that is queued has left the device; nothing is queued any more.
  void finish();

  /// Queues a validated step. At most kMaxStepsInFlight may be unfinished.
  void enqueue(std::shared_ptr<StepState> state);
  /// Queues validated copies behind the steps before them.
  void enqueue(std::shared_ptr<CopyState> state);
  uint64_t completed_steps() const { return completed_.load(std::memory_order_acquire); }
  /// Forgets the error once all that was queued has gone by; see Engine::restart. Gives the text of
  /// what the device reports even then: an exception must not be freed by one thread while another
  /// reads it, and libstdc++ counts its owners where the thread sanitizer does not look.
  std::optional<std::string> restart();
  /// The first error of any step; later steps are refused.
  std::exception_ptr error() const;

  const EngineConfig& config() const { return config_; }
  const Workspace& workspace() const { return workspace_; }
  const HostPool& host_pool() const { return host_pool_; }
  /// Builds and validates; throws Error naming every finding. Any thread.
  std::shared_ptr<const Plan> build(const Schedule& schedule, const PlanKey& key) const;
  GraphStats graph_stats() const;

 private:
  static constexpr size_t kCachedPlans = 128;

  int fix_pages(const Schedule& schedule, const std::function<int()>& choose_pages);
  using Restart = std::packaged_task<std::optional<std::string>()>;
  using Task = std::variant<std::shared_ptr<StepState>, std::shared_ptr<CopyState>,
                            std::shared_ptr<Restart>>;
  void enqueue_task(Task task);
  void loop();
  void start(const std::shared_ptr<StepState>& state);
  void start(const std::shared_ptr<CopyState>& state);
  void start(const std::shared_ptr<Restart>& restart) { (*restart)(); }
  void clear_errors();
  void issue(const std::shared_ptr<StepState>& state);
  void run_plans(StepState& state, const PlanKey& key);
  /// Runs a plan eagerly at first and when it is timed, else its graph.
  void run(CachedPlan& cached, bool is_timed, int64_t* stamps);
  void capture(CachedPlan& cached);
  void count_graphs(double seconds);
  /// Makes room for what the step brings back; before any rank runs it, as it may block the device.
  void prepare(StepState& state, int ring);
  void copy_back(StepState& state, int ring);
  void complete(StepState& state, int ring, std::exception_ptr error);
  void take_results(StepState& state, int ring) const;

  EngineConfig config_;
  std::shared_ptr<Weights> weights_;
  Backend& backend_;
  Workspace workspace_;
  Executor executor_;
  const bool reports_;            // rank 0: takes results back
  std::unique_ptr<Lane> origin_;  // orders steps: copies in, fork and join, copies out
  std::array<Buffer, Engine::kMaxStepsInFlight> sampled_host_;
  std::array<Buffer, Engine::kMaxStepsInFlight> logits_host_;  // as large as has been asked for
  struct LogprobsHost {
    Buffer top, logprobs, ranks;
  };
  std::array<LogprobsHost, Engine::kMaxStepsInFlight> logprobs_host_;
  KvCache cache_;  // made when all of the above has taken its memory
  HostPool host_pool_;
  Decoder decoder_;

  PlanCache plans_;

  std::atomic<uint64_t> completed_;
  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::deque<Task> queue_;
  std::exception_ptr error_;
  GraphStats graph_stats_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace nanoflow
