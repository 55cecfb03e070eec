#include "kernels/cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/math_loops.h"
#include "kernels/cpu/math_scratch.h"
#include "kernels/random.h"
#include "kernels/shapes.h"

// One row at a time, each on the thread that is free. Filters are applied in vLLM's order:
// temperature, min_p, top_k, top_p, each on what the one before has left. As all of them keep the
// tokens of the highest logits, a row is reduced to a cutoff; the draw then is one inverse of the
// cumulative distribution in order of tokens. Nothing is sorted: chunks below the cutoff are
// skipped, and of the others only those in doubt are partitioned.

namespace nanoflow::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// What may be sampled: logits above `logit`, and those equal to it up to token `last_tied`.
struct Cutoff {
  float logit = -kInfinity;
  int64_t last_tied = std::numeric_limits<int64_t>::max();
};

struct Candidate {
  float logit, weight;
  int32_t token;

  /// The order in which top_p takes tokens.
  bool operator<(const Candidate& other) const {
    return logit > other.logit || (logit == other.logit && token < other.token);
  }
};

struct RowBuffers {
  float* highest;         // [chunks] highest logit
  float* bounds;          // [chunks]
  double* mass;           // [chunks] summed weights of what may be sampled
  Candidate* candidates;  // [V]
  size_t bytes;

  RowBuffers(std::byte* scratch, int64_t V) {
    ScratchPieces pieces(scratch);
    const int64_t chunks = (V + kLogitChunk - 1) / kLogitChunk;
    highest = pieces.take<float>(chunks);
    bounds = pieces.take<float>(chunks);
    mass = pieces.take<double>(chunks);
    candidates = pieces.take<Candidate>(V);
    bytes = pieces.bytes();
  }
};

/// How one row is to be sampled.
struct RowParams {
  float temperature, top_p, min_p;
  int64_t top_k;
  uint64_t seed;
  uint32_t counter;
};

class RowSampler {
 public:
  RowSampler(const float* logits, int64_t V, const SamplingLoops& loops, const RowBuffers& buffers)
      : logits_(logits),
        V_(V),
        chunks_((V + kLogitChunk - 1) / kLogitChunk),
        loops_(loops),
        b_(buffers) {}

  int32_t sample(const RowParams& params) {
    if (!loops_.find_highest(logits_, V_, b_.highest)) return Sample::kInvalidLogits;
    top_ = *std::max_element(b_.highest, b_.highest + chunks_);
    if (!std::isfinite(top_)) return Sample::kInvalidLogits;
    if (!(params.temperature > 0.0f)) return greedy();
    temperature_ = params.temperature;
    if (params.min_p > 0.0f) cut_.logit = logit_of_weight(params.min_p);
    if (params.top_k > 0 && params.top_k < V_) apply_top_k(params.top_k);
    if (params.top_p < 1.0f) apply_top_p(params.top_p);
    return draw(uniform(params.seed, params.counter));
  }

 private:
  int64_t begin_of(int64_t chunk) const { return chunk * kLogitChunk; }
  int64_t end_of(int64_t chunk) const { return std::min(V_, (chunk + 1) * kLogitChunk); }
  /// The logit whose weight, relative to the highest, is `weight`.
  float logit_of_weight(float weight) const { return top_ + temperature_ * std::log(weight); }

  int32_t greedy() const {
    const int64_t chunk = std::find(b_.highest, b_.highest + chunks_, top_) - b_.highest;
    return static_cast<int32_t>(
        std::find(logits_ + begin_of(chunk), logits_ + end_of(chunk), top_) - logits_);
  }

  /// Calls fn(token) for all logits >= bound.
  template <typename Fn>
  void for_logits(float bound, const Fn& fn) const {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (b_.highest[chunk] < bound) continue;
      for (int64_t token = begin_of(chunk); token < end_of(chunk); ++token) {
        if (logits_[token] >= bound) fn(token);
      }
    }
  }

  /// Weights of a chunk's tokens, 0 for those cut off; returns their sum.
  double weigh(int64_t chunk, float* weights) const {
    const int64_t begin = begin_of(chunk), end = end_of(chunk);
    const int64_t tied_end = std::clamp(cut_.last_tied, begin - 1, end - 1) + 1;
    const float above = std::nextafter(cut_.logit, kInfinity);
    double total = 0;
    if (tied_end > begin) {
      total +=
          loops_.weigh(logits_ + begin, tied_end - begin, top_, temperature_, cut_.logit, weights);
    }
    if (end > tied_end) {
      total += loops_.weigh(logits_ + tied_end, end - tied_end, top_, temperature_, above,
                            weights + (tied_end - begin));
    }
    return total;
  }

  /// Fills the mass of every chunk; returns their sum.
  double weigh_all() {
    float weights[kLogitChunk];
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      b_.mass[chunk] = b_.highest[chunk] < cut_.logit ? 0.0 : weigh(chunk, weights);
      total += b_.mass[chunk];
    }
    return total;
  }

  /// Keeps the k highest logits and whatever ties with the last of them.
  void apply_top_k(int64_t k) {
    float bound = cut_.logit;
    if (k <= chunks_) {  // the k-th highest logit is no lower than the k-th highest chunk's
      std::copy(b_.highest, b_.highest + chunks_, b_.bounds);
      std::nth_element(b_.bounds, b_.bounds + k - 1, b_.bounds + chunks_, std::greater<>());
      bound = std::max(bound, b_.bounds[k - 1]);
    }
    int64_t count = 0;
    for_logits(bound, [&](int64_t token) {
      b_.candidates[count++] = {logits_[token], 0.0f, static_cast<int32_t>(token)};
    });
    cut_.logit = bound;
    if (count <= k) return;
    std::nth_element(b_.candidates, b_.candidates + k - 1, b_.candidates + count);
    cut_.logit = b_.candidates[k - 1].logit;
  }

  /// Keeps a token if those before it in the order of candidates have less than `p` of the mass:
  /// at least one.
  void apply_top_p(float p) {
    const double total = weigh_all();
    // All tokens below this weight weigh less than (1 - p) of the total together: none is kept.
    const double least = 0.5 * (1.0 - static_cast<double>(p)) * total / static_cast<double>(V_);
    const float bound = std::max(cut_.logit, logit_of_weight(static_cast<float>(least)));
    int64_t count = 0;
    float weights[kLogitChunk];
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (b_.highest[chunk] < bound) continue;
      weigh(chunk, weights);
      for (int64_t token = begin_of(chunk); token < end_of(chunk); ++token) {
        const float weight = weights[token - begin_of(chunk)];
        if (logits_[token] < bound) continue;
        b_.candidates[count++] = {logits_[token], weight, static_cast<int32_t>(token)};
      }
    }
    const Candidate& last = last_within(count, static_cast<double>(p) * total);
    cut_ = {.logit = last.logit, .last_tied = last.token};
  }

  /// The last candidate, in their order, before which there is less mass than `limit`.
  const Candidate& last_within(int64_t count, double limit) {
    int64_t low = 0, high = count;  // it is in [low, high)
    double before = 0;              // mass of [0, low)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      Candidate* c = b_.candidates;
      std::nth_element(c + low, c + middle, c + high);
      double mass = before;
      for (int64_t i = low; i < middle; ++i) mass += c[i].weight;
      if (mass < limit) {
        low = middle;
        before = mass;
      } else {
        high = middle;
      }
    }
    return b_.candidates[low];
  }

  int32_t draw(double u) {
    const double target = u * weigh_all();
    int64_t drawn = 0;
    double before = 0;  // mass of the chunks before `drawn`
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (b_.mass[chunk] == 0) continue;
      drawn = chunk;
      before = sum;
      sum += b_.mass[chunk];
      if (sum > target) break;
    }
    float weights[kLogitChunk];
    weigh(drawn, weights);
    int64_t token = 0;
    sum = before;
    for (int64_t i = begin_of(drawn); i < end_of(drawn); ++i) {
      const float weight = weights[i - begin_of(drawn)];
      if (weight == 0) continue;
      token = i;  // also where rounding leaves the target just out of reach
      sum += weight;
      if (sum > target) break;
    }
    return static_cast<int32_t>(token);
  }

  const float* logits_;
  const int64_t V_, chunks_;
  const SamplingLoops& loops_;
  const RowBuffers& b_;
  float top_ = 0, temperature_ = 1;
  Cutoff cut_;
};

RowParams params_of(const SamplingTables& tables, int64_t row) {
  return {.temperature = tables.temperature.data<float>()[row],
          .top_p = tables.top_p.data<float>()[row],
          .min_p = tables.min_p.data<float>()[row],
          .top_k = tables.top_k.data<int32_t>()[row],
          .seed = tables.seed.data<uint64_t>()[row],
          .counter = static_cast<uint32_t>(tables.counter.data<int32_t>()[row])};
}

void ban(const Sample& op, int64_t row, float* logits) {
  const int32_t* indptr = op.tables.banned_indptr.data<int32_t>();
  NF_CHECK(0 <= indptr[row] && indptr[row] <= indptr[row + 1] &&
               indptr[row + 1] <= op.tables.banned.size(0),
           "sample: row ", row, " bans [", indptr[row], ", ", indptr[row + 1], ") of ",
           op.tables.banned.size(0), " tokens");
  for (int32_t i = indptr[row]; i < indptr[row + 1]; ++i) {
    const int32_t token = op.tables.banned.data<int32_t>()[i];
    NF_CHECK(token >= 0 && token < op.logits.size(1), "sample: row ", row, " bans token ", token,
             " but the vocabulary has ", op.logits.size(1));
    logits[token] = -kInfinity;
  }
}

void sample_row(const Sample& op, const SamplingLoops& loops, const RowBuffers& buffers,
                int64_t row) {
  int32_t& sampled = op.sampled.data<int32_t>()[row];
  const int32_t slot = op.tables.slots.data<int32_t>()[row];
  if (slot < 0) {
    sampled = -1;
    return;
  }
  NF_CHECK(slot < op.token_pool.size(0), "sample: row ", row, " has slot ", slot, " of a pool of ",
           op.token_pool.size(0));
  float* logits = op.logits.data<float>() + row * op.logits.stride(0);
  ban(op, row, logits);
  sampled = RowSampler(logits, op.logits.size(1), loops, buffers).sample(params_of(op.tables, row));
  // A token that the next step can embed: the request fails once its owner has seen `sampled`.
  op.token_pool.data<int32_t>()[slot] = std::max(sampled, 0);
}

}  // namespace

void CpuKernels::run(const Sample& op, Lane& lane) {
  check_shapes(op);
  const SamplingLoops& loops = loop_set(isa_).sampling;
  const int64_t rows = op.logits.size(0), V = op.logits.size(1);
  const size_t scratch = RowBuffers(nullptr, V).bytes;
  cpu_lane(lane).enqueue(
      [op, &loops, rows, V, scratch](const Worker& worker) {
        const RowBuffers buffers(worker.scratch() + scratch * static_cast<size_t>(worker.index()),
                                 V);
        for (int64_t row = worker.claim(); row < rows; row = worker.claim()) {
          sample_row(op, loops, buffers, row);
        }
      },
      scratch * static_cast<size_t>(lane.width()));
}

}  // namespace nanoflow::cpu
