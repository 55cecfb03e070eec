#include "kernels/cpu/gate.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace nanoflow::cpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpinsPerClock = 16;
// Who waits longer counts as idle. Yielding costs little while nobody else wants the core, and much
// while another program does: then the core is gone for milliseconds.
constexpr std::chrono::microseconds kPatience{200};

}  // namespace

void Spin::adapt(bool was_enough) {
  const int32_t now = nanoseconds();
  const int32_t next = was_enough ? std::min(now * 2, kMost) : std::max(now / 2, kLeast);
  if (next != now) nanoseconds_.store(next, std::memory_order_relaxed);
}

void Gate::advance() {
  // Sequentially consistent with sleep_until_change(): one of the two sees the other.
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) value_.notify_all();
}

void Gate::await_change(uint32_t seen, Spin& spin) {
  if (value() != seen) return;
  const Clock::time_point start = Clock::now();
  const std::chrono::nanoseconds limit(spin.nanoseconds());
  do {
    for (int i = 0; i < kSpinsPerClock; ++i) {
      if (value() != seen) return spin.adapt(true);
      relax();
    }
  } while (Clock::now() - start < limit);
  spin.adapt(false);
  do {
    if (value() != seen) return;
    std::this_thread::yield();
  } while (Clock::now() - start < kPatience);
  sleep_until_change(seen);
}

void Gate::sleep_until_change(uint32_t seen) {
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  value_.wait(seen, std::memory_order_seq_cst);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace nanoflow::cpu
