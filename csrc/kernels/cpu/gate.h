#pragma once

#include <atomic>
#include <cstdint>

namespace nanoflow::cpu {

/// Tells the core that this thread spins.
void relax();

/// How long those who wait at one place spin. It grows while the spinning pays and shrinks while it
/// does not, as where threads outnumber cores and the spinning keeps away who is waited for.
class Spin {
 public:
  int32_t nanoseconds() const { return nanoseconds_.load(std::memory_order_relaxed); }
  void adapt(bool was_enough);

 private:
  static constexpr int32_t kLeast = 1'000;
  static constexpr int32_t kMost = 50'000;  // what waking up from sleep takes

  std::atomic<int32_t> nanoseconds_{kMost};
};

/// A counter that threads wait for. What was written before advance() is seen by those who saw the
/// advance.
class Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();
  /// Returns once value() differs from `seen`. Spins, then yields, then sleeps.
  void await_change(uint32_t seen, Spin& spin);
  /// The same for a thread that has time: sleeps at once.
  void sleep_until_change(uint32_t seen);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace nanoflow::cpu
