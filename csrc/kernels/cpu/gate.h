#pragma once

#include <atomic>
#include <cstdint>

namespace nanoflow::cpu {

/// Tells the core that this thread spins.
void relax();

/// A counter that threads wait for. What was written before advance() is seen by those who saw the
/// advance.
class Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();
  /// Returns once value() differs from `seen`. Spins, then yields, then sleeps: a thread that slept
  /// needs 30 to 50 µs to come back, longer than many tasks take.
  void await_change(uint32_t seen);
  /// The same for a thread that has time: sleeps at once.
  void sleep_until_change(uint32_t seen);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace nanoflow::cpu
