#include "pipeline/worker.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "core/error.h"
#include "pipeline/planner.h"
#include "pipeline/validate.h"

namespace nanoflow {
namespace {

void set_timings(const Plan& plan, const int64_t* stamps, StepResult& result) {
  const int64_t start = *std::min_element(stamps, stamps + 2 * plan.ops.size());
  const auto microseconds = [&](int64_t stamp) { return static_cast<double>(stamp - start) / 1e3; };
  result.begin_us = static_cast<double>(start) / 1e3;
  for (const NanoOp& op : plan.ops) {
    result.timings.push_back({.name = label_of(op),
                              .lane = plan.lanes[op.lane].name,
                              .begin_us = microseconds(stamps[2 * op.id]),
                              .end_us = microseconds(stamps[2 * op.id + 1])});
  }
}

}  // namespace

void StepState::finish(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  error_ = std::move(error);
  done_ = true;
  changed_.notify_all();
}

bool StepState::is_done() const {
  const std::lock_guard lock(mutex_);
  return done_;
}

void StepState::wait() const {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return done_; });
  if (error_ != nullptr) std::rethrow_exception(error_);
}

Worker::Worker(const EngineConfig& config, std::shared_ptr<Weights> weights)
    : config_(config),
      weights_(std::move(weights)),
      backend_(*weights_->backend()),
      cache_(weights_->spec(), backend_, config.num_pages, config.page_size),
      workspace_(config, weights_->spec(), backend_, cache_),
      decoder_(weights_, workspace_.buffers()),
      executor_(backend_, config.jitter_us),
      origin_(backend_.make_lane(backend_.width())) {
  for (Buffer& buffer : sampled_host_) {
    buffer = backend_.allocate_host(workspace_.buffers().sampled.span_bytes());
  }
  thread_ = std::thread([this] { loop(); });
}

Worker::~Worker() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  thread_.join();
  const auto drained = backend_.make_event();
  origin_->record(*drained);
  try {
    drained->synchronize();
  } catch (const std::exception&) {
    // The step that failed has told its handle.
  }
}

void Worker::enqueue(std::shared_ptr<StepState> state) {
  const std::lock_guard lock(mutex_);
  queue_.push_back(std::move(state));
  changed_.notify_all();
}

std::exception_ptr Worker::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

void Worker::loop() {
  for (;;) {
    std::shared_ptr<StepState> state;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      state = std::move(queue_.front());
      queue_.pop_front();
    }
    try {
      if (const std::exception_ptr earlier = error()) std::rethrow_exception(earlier);
      issue(state);
    } catch (...) {
      complete(*state, -1, std::current_exception());
    }
  }
}

void Worker::issue(const std::shared_ptr<StepState>& state) {
  const int ring = static_cast<int>(state->step % Engine::kMaxStepsInFlight);
  const PlanKey key = workspace_.key_of(state->batch);
  state->plan = cached_plan(state->schedule, key);
  workspace_.stage(state->batch, key, ring);
  workspace_.upload(ring, *origin_);
  if (state->batch.want_timings) {  // memory that the device writes
    state->stamps = backend_.allocate_host(2 * state->plan->ops.size() * sizeof(int64_t));
  }
  executor_.run(*state->plan, *origin_, reinterpret_cast<int64_t*>(state->stamps.data()));

  const DecoderBuffers& buffers = workspace_.buffers();
  const auto samples = static_cast<size_t>(state->batch.samples());
  backend_.copy(sampled_host_[ring].data(), buffers.sampled.bytes(), samples * sizeof(int32_t),
                *origin_);
  if (state->batch.want_logits) {
    state->result.logits.resize(samples * static_cast<size_t>(buffers.logits.size(1)));
    backend_.copy(state->result.logits.data(), buffers.logits.bytes(),
                  state->result.logits.size() * sizeof(float), *origin_);
  }
  origin_->notify([this, state, ring](std::exception_ptr error) { complete(*state, ring, error); });
}

void Worker::complete(StepState& state, int ring, std::exception_ptr error) {
  if (error == nullptr) {
    const auto* sampled = reinterpret_cast<const int32_t*>(sampled_host_[ring].data());
    state.result.tokens.assign(sampled, sampled + state.batch.samples());
    if (state.batch.want_timings) {
      set_timings(*state.plan, reinterpret_cast<const int64_t*>(state.stamps.data()), state.result);
    }
  } else {
    const std::lock_guard lock(mutex_);
    if (error_ == nullptr) error_ = error;
  }
  completed_.fetch_add(1, std::memory_order_release);
  state.finish(std::move(error));
}

std::shared_ptr<const Plan> Worker::build(const Schedule& schedule, const PlanKey& key) const {
  auto plan = std::make_shared<Plan>(build_plan(decoder_, schedule, key));
  const std::vector<std::string> findings = nanoflow::validate(*plan, backend_.width());
  std::ostringstream all;
  for (const std::string& finding : findings) all << "\n  " << finding;
  NF_CHECK(findings.empty(), "schedule '", schedule.id, "' gives an invalid plan:", all.str());
  return plan;
}

std::shared_ptr<const Plan> Worker::cached_plan(const std::shared_ptr<const Schedule>& schedule,
                                                const PlanKey& key) {
  if (cached_schedule_ != schedule) {
    plans_.clear();
    plan_index_.clear();
    cached_schedule_ = schedule;
  }
  if (const auto entry = plan_index_.find(key); entry != plan_index_.end()) {
    plans_.splice(plans_.begin(), plans_, entry->second);
    return plans_.front().second;
  }
  plans_.emplace_front(key, build(*schedule, key));
  plan_index_[key] = plans_.begin();
  if (plans_.size() > kCachedPlans) {
    plan_index_.erase(plans_.back().first);
    plans_.pop_back();
  }
  return plans_.front().second;
}

}  // namespace nanoflow
