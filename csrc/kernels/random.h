#pragma once

#include <array>
#include <cstdint>

namespace nanoflow {

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): four random
/// words that depend on counter and key alone.
constexpr std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter,
                                             std::array<uint32_t, 2> key) {
  constexpr int kRounds = 10;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = uint64_t{0xd2511f53} * counter[0];
    const uint64_t b = uint64_t{0xcd9e8d57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9e3779b9;
    key[1] += 0xbb67ae85;
  }
  return counter;
}

/// Uniform in [0, 1), 53 bits of it.
constexpr double uniform(uint64_t seed, uint32_t counter) {
  const auto words = philox4x32({counter, 0, 0, 0},
                                {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const uint64_t bits = (uint64_t{words[1]} << 32 | words[0]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

/// The sum of eight uniform 16-bit numbers, less its mean: close to a normal distribution of
/// deviation kNormalSumStd (excess kurtosis -0.15, nothing beyond 4.9 deviations), and made of
/// integers, so that devices agree on every bit.
constexpr int32_t normal_sum(uint64_t seed, uint64_t index) {
  const auto words =
      philox4x32({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0},
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  int32_t sum = -8 * 0xffff / 2;
  for (uint32_t word : words) sum += static_cast<int32_t>((word & 0xffff) + (word >> 16));
  return sum;
}

inline constexpr float kNormalSumStd = 53509.92f;  // sqrt(8 * (2^32 - 1) / 12)

}  // namespace nanoflow
