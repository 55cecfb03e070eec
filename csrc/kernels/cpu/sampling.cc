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
// skipped, a histogram over the logits tells in which bin a filter ends, and only that bin is
// partitioned.

namespace nanoflow::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kBins = 2048;

/// What may be sampled: logits above `logit`, and those equal to it up to token `last_tied`.
struct Cutoff {
  float logit = -kInfinity;
  int64_t last_tied = std::numeric_limits<int64_t>::max();
};

struct Candidate {
  float logit;
  float size;  // its weight, or 1 where tokens are counted
  int32_t token;

  /// The order in which filters take tokens.
  bool operator<(const Candidate& other) const {
    return logit > other.logit || (logit == other.logit && token < other.token);
  }
};

struct RowBuffers {
  float* highest;         // [chunks] highest logit
  float* bounds;          // [chunks]
  double* mass;           // [chunks] summed weights of what may be sampled
  double* bins;           // [kBins + 1] sizes of what lies in them; the last takes the rest
  Candidate* candidates;  // [V]
  size_t bytes;

  RowBuffers(std::byte* scratch, int64_t V) {
    ScratchPieces pieces(scratch);
    const int64_t chunks = (V + kLogitChunk - 1) / kLogitChunk;
    highest = pieces.take<float>(chunks);
    bounds = pieces.take<float>(chunks);
    mass = pieces.take<double>(chunks);
    bins = pieces.take<double>(kBins + 1);
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
    sharpness_ = 1.0f / std::max(params.temperature, 1e-30f);
    if (params.min_p > 0.0f) cut_.logit = logit_of_weight(params.min_p);
    if (params.top_k > 0 && params.top_k < V_) apply_top_k(params.top_k);
    if (params.top_p < 1.0f) apply_top_p(params.top_p);
    return draw(uniform(params.seed, params.counter));
  }

 private:
  int64_t begin_of(int64_t chunk) const { return chunk * kLogitChunk; }
  int64_t end_of(int64_t chunk) const { return std::min(V_, (chunk + 1) * kLogitChunk); }
  int64_t size_of(int64_t chunk) const { return end_of(chunk) - begin_of(chunk); }
  /// The logit whose weight, relative to the highest, is `weight`.
  float logit_of_weight(float weight) const { return top_ + temperature_ * std::log(weight); }

  int32_t greedy() const {
    const int64_t chunk = std::find(b_.highest, b_.highest + chunks_, top_) - b_.highest;
    return static_cast<int32_t>(
        std::find(logits_ + begin_of(chunk), logits_ + end_of(chunk), top_) - logits_);
  }

  /// Weights of a chunk's tokens, 0 for those cut off; returns their sum.
  double weigh(int64_t chunk, float* weights) const {
    const int64_t begin = begin_of(chunk), end = end_of(chunk);
    const int64_t tied_end = std::clamp(cut_.last_tied, begin - 1, end - 1) + 1;
    const float above = std::nextafter(cut_.logit, kInfinity);
    double total = 0;
    if (tied_end > begin) {
      total +=
          loops_.weigh(logits_ + begin, tied_end - begin, top_, sharpness_, cut_.logit, weights);
    }
    if (end > tied_end) {
      total += loops_.weigh(logits_ + tied_end, end - tied_end, top_, sharpness_, above,
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

  /// Calls fn(chunk) for all that hold a logit >= bound.
  template <typename Fn>
  void for_chunks(float bound, const Fn& fn) const {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (b_.highest[chunk] >= bound) fn(chunk);
    }
  }

  /// Keeps the k highest logits and whatever ties with the last of them.
  void apply_top_k(int64_t k) {
    float bound = std::max(cut_.logit, std::numeric_limits<float>::lowest());
    if (k <= chunks_) {  // the k-th highest logit is no lower than the k-th highest chunk's
      std::copy(b_.highest, b_.highest + chunks_, b_.bounds);
      std::nth_element(b_.bounds, b_.bounds + k - 1, b_.bounds + chunks_, std::greater<>());
      bound = std::max(bound, b_.bounds[k - 1]);
    }
    cut_.logit = last_within(bound, static_cast<double>(k), false).logit;
  }

  /// Keeps a token if those before it, in the order of candidates, have less than `p` of the mass:
  /// at least one.
  void apply_top_p(float p) {
    const double total = weigh_all();
    // All tokens below this weight weigh less than (1 - p) of the total together: none is kept.
    const double least = 0.5 * (1.0 - static_cast<double>(p)) * total / static_cast<double>(V_);
    const float lowest = std::max(cut_.logit, std::numeric_limits<float>::lowest());
    const float bound = std::max(lowest, logit_of_weight(static_cast<float>(least)));
    const Candidate last = last_within(bound, static_cast<double>(p) * total, true);
    cut_ = {.logit = last.logit, .last_tied = last.token};
  }

  /// What a filter looks at: logits >= bound, in bins from the highest down.
  struct Search {
    float bound, bins_per_logit;
    bool by_weight;  // or by number
  };

  void find_bins(const Search& search, int64_t chunk, int32_t* bins) const {
    loops_.find_bins(logits_ + begin_of(chunk), size_of(chunk), top_, search.bins_per_logit, kBins,
                     bins);
  }
  void find_sizes(const Search& search, int64_t chunk, float* sizes) const {
    if (search.by_weight) {
      weigh(chunk, sizes);
    } else {
      std::fill(sizes, sizes + kLogitChunk, 1.0f);
    }
  }

  Search search_from(float bound, bool by_weight) const {
    float lowest = top_;
    for_chunks(bound, [&](int64_t chunk) {
      const float* logits = logits_ + begin_of(chunk);
      lowest = std::min(lowest, loops_.find_lowest(logits, size_of(chunk), bound, top_));
    });
    const double bins_per_logit = std::min((kBins - 1) / (double{top_} - lowest), 1e30);
    return {bound, static_cast<float>(bins_per_logit), by_weight};
  }

  void fill_bins(const Search& search) const {
    int32_t bins[kLogitChunk];
    float sizes[kLogitChunk];
    std::fill(b_.bins, b_.bins + kBins + 1, 0.0);
    for_chunks(search.bound, [&](int64_t chunk) {
      find_bins(search, chunk, bins);
      find_sizes(search, chunk, sizes);
      for (int64_t i = 0; i < size_of(chunk); ++i) b_.bins[bins[i]] += sizes[i];
    });
  }

  /// Makes the tokens of a bin candidates; returns their number.
  int64_t collect(const Search& search, int bin) const {
    int32_t bins[kLogitChunk];
    float sizes[kLogitChunk];
    int64_t count = 0;
    for_chunks(search.bound, [&](int64_t chunk) {
      find_bins(search, chunk, bins);
      if (std::find(bins, bins + size_of(chunk), bin) == bins + size_of(chunk)) return;
      find_sizes(search, chunk, sizes);
      for (int64_t i = 0; i < size_of(chunk); ++i) {
        const int64_t token = begin_of(chunk) + i;
        if (bins[i] != bin || logits_[token] < search.bound) continue;
        b_.candidates[count++] = {logits_[token], sizes[i], static_cast<int32_t>(token)};
      }
    });
    return count;
  }

  /// Of the tokens with logits >= bound, the last in their order before which the others' weights,
  /// or number, are less than `limit`.
  Candidate last_within(float bound, double limit, bool by_weight) const {
    const Search search = search_from(bound, by_weight);
    fill_bins(search);
    int last = 0;
    double before = 0, sum = 0;  // sizes of the bins before `last`, and with it
    for (int bin = 0; bin < kBins && sum < limit; ++bin) {
      if (b_.bins[bin] == 0) continue;
      last = bin;
      before = sum;
      sum += b_.bins[bin];
    }
    return last_candidate(collect(search, last), limit - before);
  }

  /// The last of the candidates, in their order, before which there is less than `limit`.
  const Candidate& last_candidate(int64_t count, double limit) const {
    Candidate* c = b_.candidates;
    int64_t low = 0, high = count;  // it is in [low, high)
    double before = 0;              // size of [0, low)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      std::nth_element(c + low, c + middle, c + high);
      double size = before;
      for (int64_t i = low; i < middle; ++i) size += c[i].size;
      if (size < limit) {
        low = middle;
        before = size;
      } else {
        high = middle;
      }
    }
    return c[low];
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
  float top_ = 0, temperature_ = 1, sharpness_ = 1;
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
