#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "model/weights.h"
#include "pipeline/batch.h"
#include "pipeline/plan.h"
#include "pipeline/schedule.h"

namespace nanoflow {

struct EngineConfig {
  int max_num_batched_tokens = 2048;  // rows of a step
  int max_num_seqs = 256;             // requests of a step; token pool slots
  int max_scored_rows = 0;            // of a step, beyond one sampled row a request
  int max_model_len = 2048;           // positions of a request
  int page_size = 64;                 // tokens of a KV page
  int num_pages = 0;           // pages of the KV cache; 0: chosen when all else has its memory
  int host_slots = 0;          // pages that the host pool holds
  int row_granularity = 0;     // rows of a segment are padded to a multiple; 0 = the backend's
  int jitter_us = 0;           // idle up to this long around every event, to expose races
  bool enforce_eager = false;  // never capture graphs
};

/// Graphs that replay steps. They are captured when a plan runs for the second time.
struct GraphStats {
  int count = 0;       // alive
  size_t bytes = 0;    // device memory they take
  double seconds = 0;  // spent capturing since the engine was made
};

/// When one op of a step ran, in microseconds from the step's start.
struct OpTiming {
  std::string name;  // as in "layers.3.mlp.1 gemm"
  std::string lane;
  double begin_us, end_us;
};

/// See the op; K is Logprobs::kMaxTop, rows that did not ask hold anything.
struct StepLogprobs {
  std::vector<int32_t> top;     // [S, K]
  std::vector<float> logprobs;  // [S, 1 + K]
  std::vector<int32_t> ranks;   // [S]
};

struct StepResult {
  // [S] sampled; Sample::kInvalidLogits where a row's logits were not finite, -1 if it was scored
  std::vector<int32_t> tokens;
  std::vector<float> logits;      // [S, V] when asked for
  std::vector<OpTiming> timings;  // when asked for
  double begin_us = 0;            // of the step's first op by the backend's clock; with timings
  StepLogprobs logprobs;          // when asked for
};

/// Full pages of the KV cache and slots of the host pool: pages[i] and slots[i] belong together.
struct PageCopies {
  std::vector<int32_t> pages, slots;
};

enum class CopyDirection {
  kStore,  // from pages into slots
  kLoad,   // from slots into pages
};

class CopyState;

/// Copies on their way. Copyable; any thread may wait.
class CopyHandle {
 public:
  explicit CopyHandle(std::shared_ptr<CopyState> state) : state_(std::move(state)) {}
  bool is_done() const;
  /// Blocks until all are copied and returns the seconds that the copying itself took; rethrows
  /// what made it fail.
  double wait() const;

 private:
  std::shared_ptr<CopyState> state_;
};

class StepState;

/// A step on its way. Copyable; any thread may wait.
class StepHandle {
 public:
  explicit StepHandle(std::shared_ptr<StepState> state) : state_(std::move(state)) {}
  /// Number of the step, from 1.
  uint64_t step() const;
  bool is_done() const;
  /// Blocks until the step has left the device; rethrows what made it fail.
  const StepResult& wait() const;

 private:
  std::shared_ptr<StepState> state_;
};

/// The model on one device, or on the devices of several ranks: steps in, sampled tokens out.
/// submit() and copy_pages() are called from one thread.
class Engine {
 public:
  static constexpr int kMaxStepsInFlight = 2;
  static constexpr int kMaxCopiesInFlight = 8;  // calls of copy_pages, in each direction

  /// Takes complete weights (Error otherwise), one a rank and in order, allocates workspaces, lanes
  /// and then the KV cache on their backends. Where the config leaves num_pages open,
  /// `choose_pages` says it as soon as all else of rank 0 has its memory: the cache may then hold
  /// fewer tokens than max_model_len.
  Engine(const EngineConfig& config, std::vector<std::shared_ptr<Weights>> weights,
         const Schedule& schedule, const std::function<int()>& choose_pages = {});
  /// Of one rank.
  Engine(const EngineConfig& config, std::shared_ptr<Weights> weights, const Schedule& schedule,
         const std::function<int()>& choose_pages = {})
      : Engine(config, std::vector{std::move(weights)}, schedule, choose_pages) {}
  ~Engine();

  /// Checks the batch, queues it and returns at once. Throws Error on a bad batch (nothing is
  /// queued) and when kMaxStepsInFlight steps have not completed yet.
  StepHandle submit(Batch batch);
  /// Queues copies and returns at once. A store sees what the steps submitted so far write. Steps
  /// submitted from now on begin when a load is done; it does not wait for those before it, so that
  /// neither they nor copies on their way may touch its pages and slots. Throws Error on a page or
  /// slot that there is not, and with kMaxCopiesInFlight unfinished.
  CopyHandle copy_pages(CopyDirection direction, PageCopies copies);
  /// After a step has failed: returns when the device has nothing left to do, and lets steps be
  /// submitted again. What the KV cache, the token pool and slots' histories hold is undefined.
  /// Throws Error when the device reports an error even then: it cannot be used by this process any
  /// more. Handles of all steps and copies must have been waited for. An engine of several ranks
  /// has ended with the first that failed: its error is thrown again.
  void restart();
  /// Gives the device's memory of the KV cache, of all buffers and graphs back, and that of the
  /// weights as Weights::sleep() says. Handles of all steps and copies must have been waited for.
  /// Until all is awake, nothing but wake_weights() and wake_cache() may be called. Throws Error
  /// where there is a host pool, which others look into; and when the weights find no room: then
  /// what could be has been given back.
  void sleep(bool discards_weights);
  bool is_asleep() const;
  /// First; discarded weights have to be filled before the cache wakes up. Throws OutOfMemory when
  /// a device has no room any more: to be tried again.
  void wake_weights();
  /// An empty KV cache with as many pages as before. Errors as wake_weights().
  void wake_cache();
  /// Slots of the host pool, one after another: [host_slots, host_slot_bytes()].
  std::byte* host_pool() const;
  /// Bytes from slot to slot, a multiple of 4096; so are their addresses.
  size_t host_slot_bytes() const;
  /// Steps that have completed on all ranks, successfully or not: everything they read or wrote may
  /// be reused.
  uint64_t completed_steps() const;
  /// From the next step on. To return to one of the schedules set last costs nothing. Throws Error
  /// when the schedule does not fit the backend's width.
  void set_schedule(const Schedule& schedule);
  const Schedule& schedule() const;
  /// The plans that a schedule gives a step whose segments hold `segment_rows` rows, `samples` of
  /// them sampled, in the order they run: layers, then head.
  std::vector<std::shared_ptr<const Plan>> plans(const Schedule& schedule,
                                                 const std::vector<int>& segment_rows,
                                                 int samples) const;
  /// Of rank 0; the others' are alike. Any thread may ask, at any time.
  GraphStats graph_stats() const;
  const EngineConfig& config() const;
  /// Bytes of a rank's buffers that steps work in; lanes have memory of their own beside them.
  size_t workspace_bytes() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace nanoflow
