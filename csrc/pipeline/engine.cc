#include "pipeline/engine.h"

#include <algorithm>
#include <array>
#include <deque>
#include <optional>
#include <string>
#include <utility>

#include "core/error.h"
#include "pipeline/worker.h"

namespace nanoflow {
namespace {

void check(const EngineConfig& config, const ModelSpec& spec, bool chooses_pages) {
  const auto positive = [](const char* name, int value) {
    NF_CHECK(value > 0, "engine config: ", name, " is ", value, " but must be positive");
  };
  positive("max_num_batched_tokens", config.max_num_batched_tokens);
  positive("max_num_seqs", config.max_num_seqs);
  positive("max_model_len", config.max_model_len);
  positive("page_size", config.page_size);
  NF_CHECK(config.host_slots >= 0 && config.max_scored_rows >= 0,
           "engine config: host_slots and max_scored_rows must not be negative");
  NF_CHECK(config.row_granularity >= 0 && config.jitter_us >= 0,
           "engine config: row_granularity and jitter_us must not be negative");
  if (config.num_pages == 0 && chooses_pages) return;
  positive("num_pages", config.num_pages);
  const int64_t tokens = static_cast<int64_t>(config.num_pages) * config.page_size;
  NF_CHECK(tokens >= config.max_model_len, "the KV cache holds ", tokens, " tokens (",
           tokens * static_cast<int64_t>(spec.kv_bytes_per_token()),
           " bytes), too few for one request of max_model_len ", config.max_model_len,
           "; lower max_model_len or raise kv_cache_memory_bytes");
}

}  // namespace

uint64_t StepHandle::step() const { return state_->step; }
bool StepHandle::is_done() const { return state_->is_done(); }
const StepResult& StepHandle::wait() const {
  state_->wait();
  return state_->result;
}

bool CopyHandle::is_done() const { return state_->is_done(); }
double CopyHandle::wait() const {
  state_->wait();
  return state_->seconds;
}

class Engine::Impl {
 public:
  Impl(const EngineConfig& own_config, std::vector<std::shared_ptr<Weights>> own_weights)
      : config(own_config), weights(std::move(own_weights)) {}
  ~Impl() { end_workers(); }

  void make_workers(const Schedule& first, const std::function<int()>& choose_pages) {
    for (const std::shared_ptr<Weights>& own : weights) {
      workers.push_back(std::make_unique<Worker>(config, own, first, choose_pages, submitted));
      config.num_pages = workers.front()->config().num_pages;
    }
  }
  /// A rank may still read the memory of another: all end before any goes.
  void end_workers() {
    for (const std::unique_ptr<Worker>& worker : workers) worker->finish();
    workers.clear();
  }

  static constexpr size_t kSchedulesKept = 16;

  Worker& first() {
    NF_CHECK(!workers.empty(), "the engine is asleep; wake it up first");
    return *workers.front();
  }
  /// The first error of any rank, or null.
  std::exception_ptr error() const {
    for (const std::unique_ptr<Worker>& worker : workers) {
      if (const std::exception_ptr error = worker->error()) return error;
    }
    return nullptr;
  }

  EngineConfig config;
  std::vector<std::shared_ptr<Weights>> weights;  // by rank
  std::vector<std::unique_ptr<Worker>> workers;   // by rank; none while asleep
  std::shared_ptr<const Schedule> schedule;
  std::deque<std::shared_ptr<const Schedule>> checked;  // schedules set before, latest last
  uint64_t submitted = 0;
  std::array<std::deque<std::shared_ptr<CopyState>>, 2> copies;  // unfinished, by direction
};

Engine::Engine(const EngineConfig& config, std::vector<std::shared_ptr<Weights>> weights,
               const Schedule& schedule, const std::function<int()>& choose_pages) {
  NF_CHECK(!weights.empty(), "the engine needs weights");
  for (size_t rank = 0; rank < weights.size(); ++rank) {
    NF_CHECK(weights[rank] != nullptr, "the engine needs weights");
    weights[rank]->finish();
    const ModelSpec& spec = weights[rank]->spec();
    const int members = weights[rank]->backend()->communicator().members();
    NF_CHECK(spec.rank == static_cast<int>(rank) && members == static_cast<int>(weights.size()),
             "the engine was given ", weights.size(), " weights, the one at ", rank, " of rank ",
             spec.rank, " of ", spec.ranks);
  }
  check(config, weights.front()->spec(), choose_pages != nullptr);
  NF_CHECK(config.host_slots == 0 || weights.size() == 1, "engine config: host_slots is ",
           config.host_slots, ", but the host pool is for one rank, not ", weights.size());
  schedule.check();
  impl_ = std::make_unique<Impl>(config, std::move(weights));
  impl_->make_workers(schedule, choose_pages);
  set_schedule(schedule);
}

Engine::~Engine() = default;

StepHandle Engine::submit(Batch batch) {
  const uint64_t in_flight = impl_->submitted - completed_steps();
  NF_CHECK(in_flight < kMaxStepsInFlight, in_flight,
           " steps are in flight; wait for the first before another submit()");
  if (const std::exception_ptr error = impl_->error()) std::rethrow_exception(error);
  const auto segments = static_cast<int>(impl_->schedule->cuts().size()) + 1;
  nanoflow::validate(batch, impl_->first().workspace().limits(segments));
  auto state = std::make_shared<StepState>(static_cast<int>(impl_->workers.size()));
  state->step = ++impl_->submitted;
  state->batch = std::move(batch);
  state->schedule = impl_->schedule;
  for (const std::unique_ptr<Worker>& worker : impl_->workers) worker->enqueue(state);
  return StepHandle(state);
}

CopyHandle Engine::copy_pages(CopyDirection direction, PageCopies copies) {
  const HostPool& pool = impl_->first().host_pool();
  NF_CHECK(pool.num_slots() > 0, "the engine has no host pool; make it with host_slots");
  if (const std::exception_ptr error = impl_->first().error()) std::rethrow_exception(error);
  pool.validate(copies);
  auto& in_flight = impl_->copies[static_cast<size_t>(direction)];
  while (!in_flight.empty() && in_flight.front()->is_done()) in_flight.pop_front();
  NF_CHECK(in_flight.size() < kMaxCopiesInFlight, in_flight.size(),
           " copies are in flight; wait for the first before another copy_pages()");
  auto state = std::make_shared<CopyState>();
  state->copies = std::move(copies);
  state->direction = direction;
  in_flight.push_back(state);
  impl_->first().enqueue(state);
  return CopyHandle(state);
}

void Engine::restart() {
  const uint64_t in_flight = impl_->submitted - completed_steps();
  NF_CHECK(in_flight == 0, in_flight, " steps are in flight; wait for them before restart()");
  if (impl_->workers.size() > 1) {
    if (const std::exception_ptr error = impl_->error()) std::rethrow_exception(error);
    return;
  }
  if (const std::optional<std::string> error = impl_->first().restart()) {
    fail(
        "the device reports an error even after a restart, so that this process cannot use it any "
        "more; start another one: ",
        *error);
  }
}

void Engine::sleep(bool discards_weights) {
  const uint64_t in_flight = impl_->submitted - completed_steps();
  NF_CHECK(in_flight == 0, in_flight, " steps are in flight; wait for them before sleep()");
  NF_CHECK(impl_->config.host_slots == 0, "an engine with a host pool of ",
           impl_->config.host_slots, " slots cannot sleep");
  impl_->end_workers();
  for (const std::shared_ptr<Weights>& own : impl_->weights) own->sleep(discards_weights);
}

bool Engine::is_asleep() const { return impl_->workers.empty(); }

void Engine::wake_weights() {
  for (const std::shared_ptr<Weights>& own : impl_->weights) own->wake_up();
}

void Engine::wake_cache() {
  if (!is_asleep()) return;
  for (const std::shared_ptr<Weights>& own : impl_->weights) own->finish();
  try {
    impl_->make_workers(*impl_->schedule, {});
  } catch (...) {
    impl_->end_workers();
    throw;
  }
}

std::byte* Engine::host_pool() const { return impl_->first().host_pool().data(); }

size_t Engine::host_slot_bytes() const { return impl_->first().host_pool().slot_bytes(); }

uint64_t Engine::completed_steps() const {
  uint64_t completed = impl_->submitted;
  for (const std::unique_ptr<Worker>& worker : impl_->workers) {
    completed = std::min(completed, worker->completed_steps());
  }
  return completed;
}

void Engine::set_schedule(const Schedule& schedule) {
  for (const std::shared_ptr<const Schedule>& known : impl_->checked) {
    if (*known != schedule) continue;
    impl_->schedule = known;  // whose plans may still be there
    return;
  }
  schedule.check();
  // Small plans with rows in every segment show what is wrong with the schedule before a step
  // needs it.
  plans(schedule, std::vector<int>(schedule.cuts().size() + 1, 1), 1);
  impl_->schedule = std::make_shared<Schedule>(schedule);
  impl_->checked.push_back(impl_->schedule);
  if (impl_->checked.size() > Impl::kSchedulesKept) impl_->checked.pop_front();
}

const Schedule& Engine::schedule() const { return *impl_->schedule; }

std::vector<std::shared_ptr<const Plan>> Engine::plans(const Schedule& schedule,
                                                       const std::vector<int>& segment_rows,
                                                       int samples) const {
  const Worker& worker = impl_->first();
  const PlanKey key = worker.workspace().padded(segment_rows, samples, schedule.cuts());
  return {worker.build(schedule, key.layers()), worker.build(schedule, key.head())};
}

GraphStats Engine::graph_stats() const { return impl_->first().graph_stats(); }

size_t Engine::workspace_bytes() const { return impl_->first().workspace().bytes(); }

const EngineConfig& Engine::config() const { return impl_->config; }

}  // namespace nanoflow
