#include "pipeline/host_pool.h"

#include <chrono>
#include <string_view>
#include <vector>

#include "core/error.h"

namespace nanoflow {
namespace {

size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

void check_indices(std::string_view name, const std::vector<int32_t>& indices, int count) {
  std::vector<bool> seen(static_cast<size_t>(count));
  for (size_t i = 0; i < indices.size(); ++i) {
    NF_CHECK(0 <= indices[i] && indices[i] < count, "page copies: ", name, "[", i, "] is ",
             indices[i], " but must be below ", count);
    NF_CHECK(!seen[indices[i]], "page copies: ", name, "[", i, "] is ", indices[i],
             ", which stands there before");
    seen[indices[i]] = true;
  }
}

}  // namespace

HostPool::HostPool(Backend& backend, const KvCache& cache, int num_slots, int delay_us)
    : backend_(backend),
      cache_(cache),
      num_slots_(num_slots),
      delay_us_(delay_us),
      slot_bytes_(round_up(cache.page_bytes(), kAlignment)) {
  if (num_slots == 0) return;
  buffer_ = backend.allocate_host(slot_bytes_ * static_cast<size_t>(num_slots) + kAlignment);
  const auto address = reinterpret_cast<uintptr_t>(buffer_.data());
  data_ = buffer_.data() + (round_up(address, kAlignment) - address);
  for (Direction& direction : directions_) {
    direction.lane = backend.make_copy_lane();
    direction.event = backend.make_event();
    direction.stamps = backend.allocate_host(Engine::kMaxCopiesInFlight * 2 * sizeof(int64_t));
  }
}

void HostPool::run(const std::shared_ptr<CopyState>& state, Lane& origin) {
  const bool to_host = state->direction == CopyDirection::kStore;
  Direction& direction = directions_[static_cast<size_t>(state->direction)];
  auto* stamps = reinterpret_cast<int64_t*>(direction.stamps.data()) +
                 2 * (direction.count++ % Engine::kMaxCopiesInFlight);
  if (to_host) {
    origin.record(*direction.event);
    direction.lane->wait(*direction.event);
  }
  if (delay_us_ > 0) direction.lane->delay(std::chrono::microseconds(delay_us_));
  direction.lane->stamp(&stamps[0]);
  copy(state->copies, to_host, *direction.lane);
  direction.lane->stamp(&stamps[1]);
  if (!to_host) {
    direction.lane->record(*direction.event);
    origin.wait(*direction.event);
  }
  direction.lane->notify([state, stamps](std::exception_ptr error) {
    if (error == nullptr) state->seconds = static_cast<double>(stamps[1] - stamps[0]) / 1e9;
    state->finish(std::move(error));
  });
}

std::vector<Lane*> HostPool::lanes() const {
  if (num_slots_ == 0) return {};
  return {directions_[0].lane.get(), directions_[1].lane.get()};
}

void HostPool::copy(const PageCopies& copies, bool to_host, Lane& lane) {
  const size_t run_bytes = cache_.page_bytes() / static_cast<size_t>(cache_.num_layers());
  for (size_t i = 0; i < copies.pages.size(); ++i) {
    std::byte* slot = data_ + slot_bytes_ * static_cast<size_t>(copies.slots[i]);
    for (int layer = 0; layer < cache_.num_layers(); ++layer) {
      std::byte* page = cache_.page(layer, copies.pages[i]);
      std::byte* host = slot + run_bytes * static_cast<size_t>(layer);
      backend_.copy(to_host ? host : page, to_host ? page : host, run_bytes, lane);
    }
  }
}

void HostPool::validate(const PageCopies& copies) const {
  NF_CHECK(copies.pages.size() == copies.slots.size() && !copies.pages.empty(),
           "page copies: there are ", copies.pages.size(), " pages and ", copies.slots.size(),
           " slots; both must be as many, and not none");
  check_indices("pages", copies.pages, cache_.num_pages());
  check_indices("slots", copies.slots, num_slots_);
}

}  // namespace nanoflow
