#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "pipeline/completion.h"
#include "pipeline/engine.h"
#include "pipeline/kv_cache.h"

namespace nanoflow {

/// What a CopyHandle shares with the worker. `seconds` is written before it is done.
class CopyState : public Completion {
 public:
  PageCopies copies;
  CopyDirection direction;
  double seconds = 0;
};

/// Slots of host memory that each hold one page of the KV cache in one run, [slot, layer, K/V, Hkv,
/// page_size, D], and a lane for each direction. In the cache a page is one run a layer, 2 Hkv
/// page_size D elements, large enough to be copied without a staging buffer.
class HostPool {
 public:
  static constexpr size_t kAlignment = 4096;  // of slots, in address and size, as O_DIRECT wants

  /// Copies begin `delay_us` late, to expose races.
  HostPool(Backend& backend, const KvCache& cache, int num_slots, int delay_us = 0);

  int num_slots() const { return num_slots_; }
  size_t slot_bytes() const { return slot_bytes_; }
  std::byte* data() const { return data_; }

  /// Enqueues copies. A store begins behind everything given to `origin` so far, on a lane of its
  /// own; a load begins at once, and whatever is given to `origin` from now on comes behind it. At
  /// most Engine::kMaxCopiesInFlight of a direction may be unfinished.
  void run(const std::shared_ptr<CopyState>& state, Lane& origin);
  /// Those of both directions, none without slots.
  std::vector<Lane*> lanes() const;
  /// Throws Error naming the first entry that is out of range or named twice.
  void validate(const PageCopies& copies) const;

 private:
  struct Direction {
    Buffer stamps;  // int64 [kMaxCopiesInFlight, 2] nanoseconds
    uint64_t count = 0;
    std::unique_ptr<Event> event;
    std::unique_ptr<Lane> lane;  // the last: it goes first, when what is queued has run
  };
  void copy(const PageCopies& copies, bool to_host, Lane& lane);

  Backend& backend_;
  const KvCache& cache_;
  int num_slots_, delay_us_;
  size_t slot_bytes_;
  Buffer buffer_;
  std::byte* data_;
  std::array<Direction, 2> directions_;
};

}  // namespace nanoflow
