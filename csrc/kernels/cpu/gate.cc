#include "kernels/cpu/gate.h"

#include <chrono>
#include <thread>

namespace nanoflow::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough for the barriers of a task whose threads run side by side.
constexpr int kSpins = 128;
// Beyond this the waiter counts as idle. Yielding costs nothing while nobody else wants the core.
constexpr std::chrono::microseconds kPatience{200};

}  // namespace

void Gate::advance() {
  // Sequentially consistent with sleep_until_change(): one of the two sees the other.
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) value_.notify_all();
}

void Gate::await_change(uint32_t seen) {
  for (int i = 0; i < kSpins; ++i) {
    if (value() != seen) return;
    relax();
  }
  const Clock::time_point deadline = Clock::now() + kPatience;
  do {
    if (value() != seen) return;
    std::this_thread::yield();
  } while (Clock::now() < deadline);
  sleep_until_change(seen);
}

void Gate::sleep_until_change(uint32_t seen) {
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  value_.wait(seen, std::memory_order_seq_cst);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace nanoflow::cpu
