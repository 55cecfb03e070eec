#pragma once

#include <cstdint>

// Parts of the sampling kernel. Functions that take Shared are called by all threads of a block.

namespace nanoflow::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = ~0u;
constexpr int kBins = 1024;
constexpr float kBinsPerOctave = 24.0f;  // a weight of 2^-42 is beyond the last
constexpr int kMaxMembers = 4096;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kKeyBits = 32;

/// A weight, 1 for the highest logit, in units of 2^-40: sums are exact up to 2^23 tokens. What
/// weighs less than half a unit is never drawn.
using Mass = unsigned long long;
constexpr float kMassUnits = 1099511627776.0f;
constexpr int kMaxVocabulary = 1 << 23;

/// A sum that threads add to. Two 32-bit atomics, of which the second is rarely needed, are much
/// faster than a 64-bit one.
struct Sum {
  unsigned low, high;

  __device__ void clear() { low = high = 0; }
  __device__ Mass value() const { return Mass{high} << 32 | low; }
  __device__ void add(Mass mass) {
    const auto own_low = static_cast<unsigned>(mass);
    const unsigned before = atomicAdd(&low, own_low);
    const unsigned carry = before + own_low < before ? 1 : 0;
    const unsigned own_high = static_cast<unsigned>(mass >> 32) + carry;
    if (own_high != 0) atomicAdd(&high, own_high);
  }
};

struct Shared {
  Sum bins[kBins];  // of the logits that are kept
  Sum digits[kDigits];
  float members[kMaxMembers];  // logits of one bin, in no order
  unsigned member_count;
  Mass parts[kWarps];
  float highest[kWarps];
  int tokens[kWarps];
  int crossing;
  Mass before;
};

/// One row, and what may be sampled of it: logits above `cut`, and those equal to it up to token
/// `last_tied`.
struct Row {
  const float* logits;
  int count;
  float top = 0;
  float log2_scale = 1;  // log2(e) / temperature
  float cut = -INFINITY;
  int last_tied = INT32_MAX;

  __device__ Row(const float* data, int size) : logits(data), count(size) {}

  __device__ Mass mass_of(float x) const {
    return __float2ull_rn(exp2f((x - top) * log2_scale) * kMassUnits);
  }
  __device__ bool keeps(int token, float x) const {
    return x > cut || (x == cut && token <= last_tied);
  }
  /// From 0 for the highest logits; kBins and more for those without mass.
  __device__ int bin_of(float x) const {
    return static_cast<int>(fminf((top - x) * log2_scale * kBinsPerOctave, 2.0f * kBins));
  }
};

/// Calls fn(token, logit) for all tokens of the row.
template <typename Fn>
__device__ void for_logits(const Row& row, const Fn& fn) {
  constexpr int kAtOnce = 4;
  const bool is_aligned = reinterpret_cast<uintptr_t>(row.logits) % sizeof(float4) == 0;
  const int quads = is_aligned ? row.count / 4 : 0;
  const auto* vectors = reinterpret_cast<const float4*>(row.logits);
  for (int first = threadIdx.x; first < quads; first += kThreads * kAtOnce) {
    float4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kThreads < quads) x[i] = vectors[first + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int quad = first + i * kThreads;
      if (quad >= quads) continue;
      fn(4 * quad, x[i].x);
      fn(4 * quad + 1, x[i].y);
      fn(4 * quad + 2, x[i].z);
      fn(4 * quad + 3, x[i].w);
    }
  }
  for (int token = 4 * quads + threadIdx.x; token < row.count; token += kThreads) {
    fn(token, row.logits[token]);
  }
}

__device__ inline Mass warp_sum(Mass value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

/// The sum of the values up to and with this lane's.
__device__ inline Mass warp_prefix(Mass value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Mass below = __shfl_up_sync(kAllLanes, value, step);
    if (threadIdx.x % kWarp >= step) value += below;
  }
  return value;
}

/// The sum over all threads, in every thread.
__device__ inline Mass block_sum(Shared& s, Mass value) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) s.parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  Mass sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += s.parts[warp];
  __syncthreads();
  return sum;
}

struct Highest {
  float logit;
  int token;    // the first of the highest
  bool is_bad;  // there is a NaN
};

__device__ inline Highest find_highest(Shared& s, const Row& row) {
  float best = -INFINITY;
  int best_token = INT32_MAX;
  bool is_bad = false;
  const auto take = [&](int token, float x) {
    if (x > best || (x == best && token < best_token)) {
      best = x;
      best_token = token;
    }
  };
  for_logits(row, [&](int token, float x) {
    is_bad |= isnan(x);
    take(token, x);
  });
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float x = __shfl_xor_sync(kAllLanes, best, step);
    take(__shfl_xor_sync(kAllLanes, best_token, step), x);
  }
  if (threadIdx.x % kWarp == 0) {
    s.highest[threadIdx.x / kWarp] = best;
    s.tokens[threadIdx.x / kWarp] = best_token;
  }
  is_bad = __syncthreads_or(is_bad) != 0;
  for (int warp = 0; warp < kWarps; ++warp) take(s.tokens[warp], s.highest[warp]);
  __syncthreads();
  return {best, best_token, is_bad};
}

/// Sums measure(logit) of the logits at or above the cutoff, by bin.
template <typename Measure>
__device__ void fill_bins(Shared& s, const Row& row, const Measure& measure) {
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) s.bins[bin].clear();
  __syncthreads();
  for_logits(row, [&](int, float x) {
    const int bin = row.bin_of(x);
    if (bin < kBins && x >= row.cut) s.bins[bin].add(measure(x));
  });
}

/// The first entry with which a running sum reaches a limit.
struct Crossing {
  int index;    // -1: the limit is not reached
  Mass before;  // the sum of the entries before it
};

__device__ inline Crossing find_crossing(Shared& s, const Sum* sums, int count, bool is_ascending,
                                         Mass limit) {
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x;
    int found = -1;
    Mass before = 0;
    for (int begin = 0; begin < count && found < 0; begin += kWarp) {
      const int place = begin + lane;
      const Mass value = sums[is_ascending ? place : count - 1 - place].value();
      const Mass sum = before + warp_prefix(value);
      const unsigned reached = __ballot_sync(kAllLanes, sum >= limit);
      const int first = reached != 0 ? __ffs(reached) - 1 : kWarp - 1;
      if (reached != 0) found = is_ascending ? begin + first : count - 1 - (begin + first);
      before = __shfl_sync(kAllLanes, reached != 0 ? sum - value : sum, first);
    }
    if (lane == 0) {
      s.crossing = found;
      s.before = before;
    }
  }
  __syncthreads();
  return {s.crossing, s.before};
}

/// Calls fn(logit) for the gathered members, or where they were too many for all logits of the bin
/// that are kept.
template <typename Fn>
__device__ void for_members(const Shared& s, const Row& row, int bin, const Fn& fn) {
  if (s.member_count <= kMaxMembers) {
    for (unsigned i = threadIdx.x; i < s.member_count; i += kThreads) fn(s.members[i]);
    return;
  }
  for_logits(row, [&](int, float x) {
    if (row.bin_of(x) == bin && x >= row.cut) fn(x);
  });
}

/// Gathers what is kept of a bin.
__device__ inline void gather_members(Shared& s, const Row& row, int bin) {
  if (threadIdx.x == 0) s.member_count = 0;
  __syncthreads();
  for_logits(row, [&](int, float x) {
    if (row.bin_of(x) != bin || x < row.cut) return;
    const unsigned place = atomicAdd(&s.member_count, 1u);
    if (place < kMaxMembers) s.members[place] = x;
  });
  __syncthreads();
}

/// Unsigned numbers in the order of the floats.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float logit_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

struct Selected {
  float logit;
  Mass above;  // measure of the bin's higher logits
  Mass tied;   // measure of those equal to it
};

/// The highest logit of a bin such that it and those above it measure at least `limit`: a radix
/// select, a digit of the key at a time.
template <typename Measure>
__device__ Selected select(Shared& s, const Row& row, int bin, Mass limit, const Measure& measure) {
  gather_members(s, row, bin);
  uint32_t key = 0, known = 0;
  Mass above = 0;
  for (int shift = kKeyBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    if (threadIdx.x < kDigits) s.digits[threadIdx.x].clear();
    __syncthreads();
    for_members(s, row, bin, [&](float x) {
      const uint32_t own = key_of(x);
      if ((own & known) == key) s.digits[own >> shift & (kDigits - 1)].add(measure(x));
    });
    const Crossing digit = find_crossing(s, s.digits, kDigits, false, limit - above);
    above += digit.before;
    key |= static_cast<uint32_t>(digit.index) << shift;
    known |= static_cast<uint32_t>(kDigits - 1) << shift;
  }
  return {logit_of(key), above, s.digits[key & (kDigits - 1)].value()};
}

/// The first token, in their order, with which the running sum of measure(token, logit) exceeds
/// target_of(sum of all).
template <typename Measure, typename Target>
__device__ int locate(Shared& s, const Row& row, const Measure& measure, const Target& target_of) {
  int begin = 0, end = row.count;
  Mass target = 0;
  for (bool is_first = true; is_first || end - begin > kWarp; is_first = false) {
    const int part = ((end - begin + kWarps - 1) / kWarps + kWarp - 1) / kWarp * kWarp;
    const int own_begin = begin + static_cast<int>(threadIdx.x) / kWarp * part;
    const int own_end = min(end, own_begin + part);
    Mass sum = 0;
#pragma unroll 8
    for (int token = own_begin + threadIdx.x % kWarp; token < own_end; token += kWarp) {
      sum += measure(token, row.logits[token]);
    }
    sum = warp_sum(sum);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) s.parts[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (is_first) {
      Mass total = 0;
      for (int warp = 0; warp < kWarps; ++warp) total += s.parts[warp];
      target = target_of(total);
    }
    int warp = 0;
    while (warp + 1 < kWarps && s.parts[warp] <= target) target -= s.parts[warp++];
    begin += warp * part;
    end = min(end, begin + part);
  }
  const int token = begin + static_cast<int>(threadIdx.x) % kWarp;
  const Mass sum = warp_prefix(token < end ? measure(token, row.logits[token]) : 0);
  __syncthreads();
  return begin + __ffs(__ballot_sync(kAllLanes, sum > target)) - 1;
}

}  // namespace
}  // namespace nanoflow::cuda
