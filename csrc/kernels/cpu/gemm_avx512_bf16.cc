#include "kernels/cpu/math_avx512_bf16.h"
// What is written against it:
#include "kernels/cpu/gemm_dot512.h"
#include "kernels/cpu/gemm_pack512.h"

// Few rows are multiplied by dot products. For many, vectors are 16 activation rows, packed so that
// pairs of k lie side by side; a pair of a weight row is repeated for all of them as it is read, so
// weights are used as they lie in memory. Sums of outᵀ are turned when they are written.
//
// Both add up in one order. A dot product keeps 16 sums in a vector, one for the pairs at each
// place in a step of K. Here one place after another is summed up over a block of K, and the 16
// sums are added as reduce() does it.

namespace nanoflow::cpu {
namespace {

struct Dot : Avx512 {
  using Element = BFloat16;
  using Operand = __m512bh;
  static constexpr int kChunk = 32;

  static Operand load(const BFloat16* from) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
  }
  static Operand load_part(const BFloat16* from, int count) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
  }
  static void multiply_add(Sum& sum, Operand x, Operand w) { sum = _mm512_dpbf16_ps(sum, x, w); }
};

constexpr int64_t kFewRows = 2;                 // for which packing does not pay
constexpr int kPlaces = 16;                     // of pairs in a step of K
constexpr int64_t kMostTiles = 4;               // tiles of activations multiplied at a time
constexpr int64_t kPanel = kMostTiles * kTile;  // rows of them
constexpr int64_t kSlabBytes = 4 << 20;         // packed activations
constexpr int64_t kSlabPanels = 8;              // at most, so that sums stay in the second cache
constexpr int64_t kChunk = 96, kHalf = 48;      // weight rows that a thread takes at a time

/// Which place is summed up n-th: n with its bits reversed, as then reduce() adds neighbours first
/// and few sums wait for their partners.
constexpr int place(int n) { return (n & 1) << 3 | (n & 2) << 1 | (n & 4) >> 1 | (n & 8) >> 3; }

/// How a product is cut up, and where its parts lie in the scratch.
struct Plan {
  int64_t steps;          // k tiles of K
  int64_t block_steps;    // k tiles of a block
  int64_t slab;           // activation rows packed at a time, whole panels
  int64_t chunk, chunks;  // weight rows taken at a time, and how often
  int64_t packed_bytes, sums_floats;

  Plan(const GemmArgs& args, int width) {
    steps = ceil_div(args.K, kStep);
    block_steps = block_depth(args.K) / kStep;
    const int64_t fit = kSlabBytes / (max(1, steps) * kMostTiles * kTileBytes);
    const int64_t panels = max(1, min(ceil_div(args.T, kPanel), min(fit, kSlabPanels)));
    slab = panels * kPanel;
    chunk = args.N >= 4 * width * kChunk ? kChunk : kHalf;
    chunks = ceil_div(args.N, chunk);
    packed_bytes = panels * steps * kMostTiles * kTileBytes;
    sums_floats = slab * padded_chunk();
  }
  /// Sums are turned 32 weight rows at a time.
  int64_t padded_chunk() const { return ceil_div(chunk, 2 * kTile) * 2 * kTile; }
};

/// Packs rows [begin, end) as [panel][block][place][step][tile of 16 rows], the threads each a
/// share.
void pack(const GemmArgs& args, const Plan& plan, int64_t begin, int64_t end, const Worker& worker,
          char* packed) {
  const auto* x = static_cast<const BFloat16*>(args.x);
  const int64_t all = ceil_div(end - begin, kTile);
  const Worker::Range share = worker.share(all * plan.steps);
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int64_t tile = i / plan.steps, step = i % plan.steps;
    const int64_t first = tile / kMostTiles * kMostTiles;
    const int64_t tiles = min(kMostTiles, all - first);  // of the panel
    const int64_t block = step / plan.block_steps * plan.block_steps;
    const int64_t block_steps = min(plan.block_steps, plan.steps - block);
    char* to = packed + (first * plan.steps + block * tiles) * kTileBytes +
               ((step - block) * tiles + tile - first) * 64;
    const int64_t row = begin + tile * kTile, k = step * kStep;
    pack_tile(x + row * args.x_stride + k, args.x_stride, min(kTile, end - row),
              min(kStep, args.K - k),
              [=](int pair) { return to + place(pair) * block_steps * tiles * 64; });
  }
}

/// Some weight rows over a block of K.
struct WeightRows {
  const BFloat16* at;
  int64_t stride;  // elements
  int64_t steps;
  int64_t rest;  // elements behind the whole steps
};

/// sums += products of one pair of k of all rows.
template <int kTiles, int kRows>
[[gnu::always_inline]] inline void multiply_pair(const BFloat16* w, int64_t stride, const char* x,
                                                 Vec (&sums)[kRows][kTiles]) {
  __m512bh tiles[kTiles];
#pragma GCC unroll 4
  for (int i = 0; i < kTiles; ++i) {
    tiles[i] = reinterpret_cast<__m512bh>(_mm512_load_si512(x + i * 64));
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    int both;
    __builtin_memcpy(&both, w + row * stride, sizeof both);
    const auto repeated = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 4
    for (int i = 0; i < kTiles; ++i) {
      sums[row][i] = _mm512_dpbf16_ps(sums[row][i], tiles[i], repeated);
    }
  }
}

/// Calls fn(sum, i) for all sums of a tile, the i-th of them.
template <int kTiles, int kRows, typename Fn>
[[gnu::always_inline]] inline void for_sums(Vec (&sums)[kRows][kTiles], const Fn& fn) {
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kTiles; ++i) fn(sums[row][i], row * kTiles + i);
  }
}

/// Asks for the n-th part of as many weight rows as `w` has, behind them, to be brought from
/// memory.
template <int kRows>
void fetch_next(const WeightRows& w, int n) {
  for (int64_t step = n; step < w.steps; step += kPlaces) {
    for (int row = 0; row < kRows; ++row) {
      __builtin_prefetch(w.at + (kRows + row) * w.stride + step * kStep);
    }
  }
}

/// saved [kRows][kTiles][16] (+)= weight rows x a block of packed activations.
template <int kTiles, int kRows>
void multiply(const WeightRows& w, const char* x, bool is_first, float* saved) {
  Vec kept[4][kRows * kTiles];  // sums of 8, 4, 2 and 1 places
  alignas(64) BFloat16 edge[kRows * kStep];
  for (int row = 0; row < kRows && w.rest > 0; ++row) {
    const __mmask32 mask = (1u << w.rest) - 1;
    const BFloat16* from = w.at + row * w.stride + w.steps * kStep;
    _mm512_store_si512(edge + row * kStep, _mm512_maskz_loadu_epi16(mask, from));
  }
  for (int n = 0; n < kPlaces; ++n) {
    fetch_next<kRows>(w, n);
    Vec sums[kRows][kTiles] = {};
    const BFloat16* at = w.at + 2 * place(n);
    for (int64_t step = 0; step < w.steps; ++step) {
      multiply_pair<kTiles, kRows>(at + step * kStep, w.stride, x, sums);
      x += kTiles * 64;
    }
    if (w.rest > 0) {
      multiply_pair<kTiles, kRows>(edge + 2 * place(n), kStep, x, sums);
      x += kTiles * 64;
    }
    int level = 3;
    for (int left = n; left & 1; left >>= 1, --level) {
      for_sums(sums, [&](Vec& sum, int i) { sum = sum + kept[level][i]; });
    }
    if (n + 1 < kPlaces) {
      for_sums(sums, [&](Vec& sum, int i) { kept[level][i] = sum; });
    } else {
      for_sums(sums, [&](Vec& sum, int i) {
        store(saved + i * kTile, is_first ? sum : load(saved + i * kTile) + sum);
      });
    }
  }
}

/// As many weight rows as the registers hold sums of.
template <int kTiles>
constexpr int kRowsOf = kTiles == 1 ? 12 : 24 / kTiles;

template <int kTiles>
void multiply_rows(WeightRows w, int64_t rows, const char* x, bool is_first, float* saved) {
  constexpr int kRows = kRowsOf<kTiles>;
  for (; rows >= kRows; rows -= kRows) {
    multiply<kTiles, kRows>(w, x, is_first, saved);
    w.at += kRows * w.stride;
    saved += kRows * kTiles * kTile;
  }
  for (; rows > 0; --rows) {
    multiply<kTiles, 1>(w, x, is_first, saved);
    w.at += w.stride;
    saved += kTiles * kTile;
  }
}

/// One thread's part of a slab of activations.
template <typename Epilogue>
class SlabProduct {
 public:
  SlabProduct(const GemmArgs& args, const Plan& plan, const Worker& worker)
      : args_(args),
        plan_(plan),
        packed_(reinterpret_cast<const char*>(worker.scratch())),
        sums_(reinterpret_cast<float*>(worker.scratch() + plan.packed_bytes) +
              worker.index() * plan.sums_floats) {}

  void set_rows(int64_t begin, int64_t end) { begin_ = begin, end_ = end; }

  void run(int64_t chunk) {
    const int64_t n = chunk * plan_.chunk, rows = min(plan_.chunk, args_.N - n);
    const auto* weight = static_cast<const BFloat16*>(args_.weight) + n * args_.weight_stride;
    for (int64_t step = 0; step < plan_.steps; step += plan_.block_steps) {
      const int64_t depth = min(plan_.block_steps * kStep, args_.K - step * kStep);
      const WeightRows block{.at = weight + step * kStep,
                             .stride = args_.weight_stride,
                             .steps = depth / kStep,
                             .rest = depth % kStep};
      for (int64_t t = begin_; t < end_; t += kPanel) {
        const int64_t tiles = tiles_at(t);
        const char* x = packed_ + ((t - begin_) / kTile * plan_.steps + step * tiles) * kTileBytes;
        multiply_panel(block, rows, tiles, x, step == 0, sums_at(t));
        if (step + plan_.block_steps >= plan_.steps) write(t, n, rows);
      }
    }
  }

 private:
  int64_t tiles_at(int64_t t) const { return min(kMostTiles, ceil_div(end_ - t, kTile)); }
  float* sums_at(int64_t t) const { return sums_ + (t - begin_) * plan_.padded_chunk(); }

  static void multiply_panel(const WeightRows& w, int64_t rows, int64_t tiles, const char* x,
                             bool is_first, float* sums) {
    switch (tiles) {
      case 1:
        return multiply_rows<1>(w, rows, x, is_first, sums);
      case 2:
        return multiply_rows<2>(w, rows, x, is_first, sums);
      case 3:
        return multiply_rows<3>(w, rows, x, is_first, sums);
      default:
        return multiply_rows<4>(w, rows, x, is_first, sums);
    }
  }

  /// Turns the sums of a panel [chunk][tiles][16 t] and writes them, 32 weight rows at a time.
  void write(int64_t t, int64_t n, int64_t rows) const {
    const int64_t stride = tiles_at(t) * kTile;
    const int64_t t_end = min(end_, t + kPanel);
    for (int64_t row = 0; row < rows; row += 2 * kTile) {
      const float* from = sums_at(t) + row * stride;
      const auto columns = static_cast<int>(min(2 * kTile, rows - row));
      for (int64_t first = t; first < t_end; first += 4, from += 4) {
        Vec low[4], high[4];
        transpose_16x4(from, stride * 4, low);
        transpose_16x4(from + kTile * stride, stride * 4, high);
        for (int i = 0; i < 4 && first + i < t_end; ++i) {
          Epilogue::store(args_, first + i, n + row, low[i], high[i], columns);
        }
      }
    }
  }

  const GemmArgs& args_;
  const Plan& plan_;
  const char* packed_;  // of all threads
  float* sums_;         // of this one
  int64_t begin_ = 0, end_ = 0;
};

template <typename Epilogue, typename FewRows>
void run(const GemmArgs& args, const Worker& worker) {
  if (args.T <= kFewRows) return FewRows::run(args, worker);
  const Plan plan(args, worker.width());
  SlabProduct<Epilogue> product(args, plan, worker);
  int64_t claim = worker.claim();
  int64_t done = 0;  // claims of earlier slabs
  for (int64_t begin = 0; begin < args.T; begin += plan.slab, done += plan.chunks) {
    const int64_t end = min(args.T, begin + plan.slab);
    if (begin > 0) worker.sync();  // until nobody reads the packed rows
    pack(args, plan, begin, end, worker, reinterpret_cast<char*>(worker.scratch()));
    worker.sync();
    product.set_rows(begin, end);
    for (; claim < done + plan.chunks; claim = worker.claim()) product.run(claim - done);
  }
}

size_t scratch_bytes(const GemmArgs& args, int width) {
  if (args.T <= kFewRows) return 0;
  const Plan plan(args, width);
  return static_cast<size_t>(plan.packed_bytes + width * plan.sums_floats * 4);
}

}  // namespace

constinit const GemmKernels kGemmAvx512Bf16BF16 = {
    .same = {run<Plain<BFloat16>, DotGemm<Dot, BFloat16>>, scratch_bytes},
    .f32 = {run<Plain<float>, DotGemm<Dot, float>>, scratch_bytes},
    .silu_mul = {run<SiluMul, DotGemm<Dot, BFloat16, true>>, scratch_bytes}};

}  // namespace nanoflow::cpu
