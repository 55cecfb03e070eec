#include "pipeline/worker.h"

#include <algorithm>
#include <chrono>
#include <sstream>
#include <utility>

#include "core/error.h"
#include "pipeline/planner.h"
#include "pipeline/validate.h"

namespace nanoflow {
namespace {

using Plans = std::vector<std::shared_ptr<const Plan>>;

size_t num_stamps(const Plans& plans) {
  size_t count = 0;
  for (const auto& plan : plans) count += 2 * plan->ops.size();
  return count;
}

void set_timings(const Plans& plans, const int64_t* stamps, StepResult& result) {
  const int64_t start = *std::min_element(stamps, stamps + num_stamps(plans));
  const auto microseconds = [&](int64_t stamp) { return static_cast<double>(stamp - start) / 1e3; };
  result.begin_us = static_cast<double>(start) / 1e3;
  for (const auto& plan : plans) {
    for (const NanoOp& op : plan->ops) {
      result.timings.push_back({.name = op.name,
                                .lane = plan->lanes[op.lane].name,
                                .begin_us = microseconds(stamps[2 * op.id]),
                                .end_us = microseconds(stamps[2 * op.id + 1])});
    }
    stamps += 2 * plan->ops.size();
  }
}

template <typename T>
std::vector<T> entries(const Buffer& buffer, size_t count) {
  const T* begin = reinterpret_cast<const T*>(buffer.data());
  return std::vector<T>(begin, begin + count);
}

}  // namespace

Worker::Worker(const EngineConfig& config, std::shared_ptr<Weights> weights,
               const Schedule& schedule, const std::function<int()>& choose_pages,
               uint64_t completed)
    : config_(config),
      weights_(std::move(weights)),
      backend_(*weights_->backend()),
      workspace_(config, weights_->spec(), backend_, weights_->has_o_columns()),
      executor_(backend_, config.jitter_us),
      reports_(weights_->spec().rank == 0),
      origin_(backend_.make_lane(backend_.width())),
      cache_(weights_->spec(), backend_, fix_pages(schedule, choose_pages), config.page_size),
      host_pool_(backend_, cache_, config.host_slots, config.jitter_us),
      decoder_(weights_, workspace_.bind(cache_)),
      plans_(kCachedPlans,
             [this](const Schedule& schedule, const PlanKey& key) { return build(schedule, key); }),
      completed_(completed) {
  for (Buffer& buffer : sampled_host_) {
    buffer = backend_.allocate_host(workspace_.buffers().sampled.span_bytes());
  }
  for (LogprobsHost& host : logprobs_host_) {
    host.top = backend_.allocate_host(workspace_.buffers().top.span_bytes());
    host.logprobs = backend_.allocate_host(workspace_.buffers().logprobs.span_bytes());
    host.ranks = backend_.allocate_host(workspace_.buffers().ranks.span_bytes());
  }
  thread_ = std::thread([this] { loop(); });
}

int Worker::fix_pages(const Schedule& schedule, const std::function<int()>& choose_pages) {
  for (const std::vector<std::string>& stages :
       {std::vector<std::string>{"qkv", "attn", "o", "mlp"}, {"head"}}) {
    std::vector<int> widths;
    for (const LaneSpec& lane : schedule.lanes_of(stages)) widths.push_back(lane.width);
    executor_.make_lanes(widths, *origin_);
  }
  for (int lane : {schedule.collective_lane(), schedule.lane_of("head", 0)}) {
    backend_.communicator().prepare(schedule.lanes[lane].width);
  }
  if (config_.num_pages == 0) config_.num_pages = choose_pages();
  return config_.num_pages;
}

Worker::~Worker() { finish(); }

void Worker::finish() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  thread_.join();
  try {
    const auto drained = backend_.make_event();
    origin_->record(*drained);
    drained->synchronize();
  } catch (const std::exception&) {
    // The step that failed has told its handle; a device that has failed for good has no events.
  }
}

void Worker::enqueue(std::shared_ptr<StepState> state) { enqueue_task(std::move(state)); }

void Worker::enqueue(std::shared_ptr<CopyState> state) { enqueue_task(std::move(state)); }

std::optional<std::string> Worker::restart() {
  const auto task = std::make_shared<Restart>([this]() -> std::optional<std::string> {
    try {
      clear_errors();
    } catch (const std::exception& error) {
      return error.what();
    }
    return std::nullopt;
  });
  std::future<std::optional<std::string>> done = task->get_future();
  enqueue_task(task);
  return done.get();
}

void Worker::clear_errors() {
  std::vector<Lane*> lanes = executor_.lanes(), copying = host_pool_.lanes();
  lanes.insert(lanes.end(), copying.begin(), copying.end());
  lanes.push_back(origin_.get());
  // Errors spread while lanes still wait for each other: so all are cleared before any is asked.
  std::vector<std::unique_ptr<Event>> reached;
  for (Lane* lane : lanes) {
    lane->clear_error();
    reached.push_back(backend_.make_event());
    lane->record(*reached.back());
  }
  for (const auto& event : reached) event->synchronize();
  const std::lock_guard lock(mutex_);
  error_ = nullptr;
}

void Worker::enqueue_task(Task task) {
  const std::lock_guard lock(mutex_);
  queue_.push_back(std::move(task));
  changed_.notify_all();
}

std::exception_ptr Worker::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

void Worker::loop() {
  for (;;) {
    Task task;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      task = std::move(queue_.front());
      queue_.pop_front();
    }
    std::visit([this](const auto& state) { start(state); }, task);
  }
}

void Worker::start(const std::shared_ptr<StepState>& state) {
  try {
    if (const std::exception_ptr earlier = error()) std::rethrow_exception(earlier);
    issue(state);
  } catch (...) {
    complete(*state, -1, std::current_exception());
  }
}

void Worker::start(const std::shared_ptr<CopyState>& state) {
  try {
    host_pool_.run(state, *origin_);
  } catch (...) {
    state->finish(std::current_exception());
  }
}

void Worker::issue(const std::shared_ptr<StepState>& state) {
  // No rank's device waits for another rank's host any more while this one may be blocked.
  backend_.communicator().meet();
  const int ring = static_cast<int>(state->step % Engine::kMaxStepsInFlight);
  const PlanKey key = workspace_.key_of(state->batch, state->schedule->cuts());
  workspace_.stage(state->batch, key, ring);
  workspace_.upload(state->batch, ring, *origin_);
  if (plans_.release(completed_steps())) count_graphs(0);
  if (reports_) prepare(*state, ring);
  run_plans(*state, key);
  if (reports_) copy_back(*state, ring);
  origin_->notify([this, state, ring](std::exception_ptr error) { complete(*state, ring, error); });
}

void Worker::run_plans(StepState& state, const PlanKey& key) {
  std::vector<CachedPlan*> plans{&plans_.get(state.schedule, key.layers(), state.step)};
  if (key.samples > 0) plans.push_back(&plans_.get(state.schedule, key.head(), state.step));
  if (reports_ && state.batch.want_timings) {
    for (const CachedPlan* cached : plans) state.plans.push_back(cached->plan);
    // Memory that the device writes.
    state.stamps = backend_.allocate_host(num_stamps(state.plans) * sizeof(int64_t));
  }
  int64_t* stamps = reports_ ? reinterpret_cast<int64_t*>(state.stamps.data()) : nullptr;
  for (CachedPlan* cached : plans) {
    run(*cached, state.batch.want_timings, stamps);
    if (stamps != nullptr) stamps += 2 * cached->plan->ops.size();
  }
}

void Worker::run(CachedPlan& cached, bool is_timed, int64_t* stamps) {
  if (config_.enforce_eager || is_timed || !cached.has_run) {
    backend_.communicator().meet();
    executor_.run(*cached.plan, *origin_, stamps);
    cached.has_run = true;
    return;
  }
  if (cached.graph == nullptr) capture(cached);
  cached.graph->launch(*origin_);
}

void Worker::capture(CachedPlan& cached) {
  backend_.communicator().meet();
  const auto begin = std::chrono::steady_clock::now();
  cached.graph =
      backend_.capture(*origin_, [this, plan = cached.plan] { executor_.run(*plan, *origin_); });
  backend_.communicator().meet();
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
  count_graphs(time.count());
}

void Worker::count_graphs(double seconds) {
  const GraphStats alive = plans_.graph_stats();
  const std::lock_guard lock(mutex_);
  graph_stats_ = {alive.count, alive.bytes, graph_stats_.seconds + seconds};
}

void Worker::prepare(StepState& state, int ring) {
  if (!state.batch.want_logits) return;
  const size_t bytes =
      workspace_.buffers().logits.slice_rows(0, state.batch.samples()).span_bytes();
  if (logits_host_[ring].bytes() < bytes) logits_host_[ring] = backend_.allocate_host(bytes);
}

void Worker::copy_back(StepState& state, int ring) {
  const DecoderBuffers& buffers = workspace_.buffers();
  const int64_t samples = state.batch.samples();
  const auto copy = [&](Buffer& to, const Tensor& from) {
    backend_.copy(to.data(), from.bytes(), from.slice_rows(0, samples).span_bytes(), *origin_);
  };
  copy(sampled_host_[ring], buffers.sampled);
  if (state.batch.wants_logprobs()) {
    LogprobsHost& host = logprobs_host_[ring];
    copy(host.top, buffers.top);
    copy(host.logprobs, buffers.logprobs);
    copy(host.ranks, buffers.ranks);
  }
  if (state.batch.want_logits) copy(logits_host_[ring], buffers.logits);
}

void Worker::complete(StepState& state, int ring, std::exception_ptr error) {
  // A rank that fails ends the collectives of the others: what they give is not to be believed.
  Communicator& communicator = backend_.communicator();
  if (communicator.members() > 1) {
    error = error == nullptr ? communicator.cause() : communicator.abort(error);
  }
  if (error == nullptr) {
    if (reports_) take_results(state, ring);
  } else {
    const std::lock_guard lock(mutex_);
    if (error_ == nullptr) error_ = error;
  }
  completed_.fetch_add(1, std::memory_order_release);
  state.finish(std::move(error));
}

void Worker::take_results(StepState& state, int ring) const {
  const auto* sampled = reinterpret_cast<const int32_t*>(sampled_host_[ring].data());
  state.result.tokens.assign(sampled, sampled + state.batch.samples());
  const size_t samples = state.result.tokens.size();
  if (state.batch.want_logits) {
    const auto vocabulary = static_cast<size_t>(workspace_.buffers().logits.size(1));
    state.result.logits = entries<float>(logits_host_[ring], samples * vocabulary);
  }
  if (state.batch.wants_logprobs()) {
    const LogprobsHost& host = logprobs_host_[ring];
    const size_t top = Logprobs::kMaxTop;
    state.result.logprobs = {.top = entries<int32_t>(host.top, samples * top),
                             .logprobs = entries<float>(host.logprobs, samples * (1 + top)),
                             .ranks = entries<int32_t>(host.ranks, samples)};
  }
  if (state.batch.want_timings) {
    set_timings(state.plans, reinterpret_cast<const int64_t*>(state.stamps.data()), state.result);
  }
}

std::shared_ptr<const Plan> Worker::build(const Schedule& schedule, const PlanKey& key) const {
  auto plan = std::make_shared<Plan>(build_plan(decoder_, schedule, key));
  const std::vector<std::string> findings = nanoflow::validate(*plan, backend_.width());
  std::ostringstream all;
  for (const std::string& finding : findings) all << "\n  " << finding;
  NF_CHECK(findings.empty(), "schedule '", schedule.id, "' gives an invalid plan:", all.str());
  return plan;
}

GraphStats Worker::graph_stats() const {
  const std::lock_guard lock(mutex_);
  return graph_stats_;
}

}  // namespace nanoflow
