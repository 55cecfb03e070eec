#include "kernels/cpu/math_avx512_bf16.h"
// What is written against it:
#include "kernels/cpu/gemm_pack512.h"

// Weight rows are tiles as they lie in memory (16 n x 32 k); activations are packed so that pairs
// of k lie side by side (16 pairs x 16 t). The product of the two is outᵀ, turned when it is
// written. A panel of 32 weight rows stays in the first cache while the packed activations stream
// by from the second.

namespace nanoflow::cpu {
namespace {

constexpr int64_t kPanel = 2 * kTile;      // weight rows multiplied at a time
constexpr int64_t kPair = 2 * kTile;       // activation rows multiplied at a time
constexpr int64_t kSlabBytes = 768 << 10;  // packed activations, well inside 2 MB of second cache
constexpr int64_t kPanelSteps = 20;  // the deepest panel (40 KB) that stays in the first cache
constexpr int64_t kBlockSteps = 12;  // depth of the panels of a longer K

/// How a product is cut up, and where its parts lie in the scratch.
struct Plan {
  int64_t steps;        // k tiles of K
  int64_t block_steps;  // k tiles of a panel
  int64_t slab;         // activation rows packed at a time, whole pairs
  int64_t panels;       // of N
  int64_t packed_bytes, panel_bytes, sums_bytes;

  explicit Plan(const GemmArgs& args) {
    steps = ceil_div(args.K, kStep);
    block_steps = steps <= kPanelSteps ? steps : kBlockSteps;
    const int64_t pairs =
        max(1, min(ceil_div(args.T, kPair), kSlabBytes / (2 * kTileBytes * steps)));
    slab = pairs * kPair;
    panels = ceil_div(args.N, kPanel);
    packed_bytes = pairs * steps * 2 * kTileBytes;
    panel_bytes = block_steps * 2 * kTileBytes;
    sums_bytes = pairs * 4 * kTileBytes;
  }
};

/// Packs rows [begin, end) as [pair][step][half], the threads each a share.
void pack(const GemmArgs& args, const Plan& plan, int64_t begin, int64_t end, const Worker& worker,
          char* packed) {
  const auto* x = static_cast<const BFloat16*>(args.x);
  const Worker::Range units = worker.share(ceil_div(end - begin, kPair) * plan.steps);
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t row = begin + unit / plan.steps * kPair;
    const int64_t k = unit % plan.steps * kStep;
    for (int64_t half = 0; half < 2 && row + half * kTile < end; ++half) {
      const int64_t first = row + half * kTile;
      char* tile = packed + (unit * 2 + half) * kTileBytes;
      pack_tile(x + first * args.x_stride + k, args.x_stride, min(kTile, end - first),
                min(kStep, args.K - k), [tile](int pair) { return tile + pair * 64; });
    }
  }
}

/// Sums on their way to out: 32 n x 32 t as the tiles were stored, turned four t at a time between
/// the tile products of the block that follows.
template <typename Epilogue>
struct Pending {
  const GemmArgs* args = nullptr;
  const char* sums = nullptr;  // [2][32 n][16 t] float
  int64_t t = 0, n = 0;        // of the first sum
  int64_t rows = 0, next = 0;  // t

  void advance() {
    if (next >= rows) return;
    const char* from = sums + next / kTile * 2 * kTileBytes + next % kTile * 4;
    Vec low[4], high[4];
    transpose_16x4(from, 64, low);
    transpose_16x4(from + kTileBytes, 64, high);
    const auto columns = static_cast<int>(min(kPanel, args->N - n));
    for (int i = 0; i < 4 && next + i < rows; ++i) {
      Epilogue::store(*args, t + next + i, n, low[i], high[i], columns);
    }
    next += 4;
  }
  void finish() {
    while (next < rows) advance();
  }
};

/// 32 weight rows, a block of K deep.
struct Panel {
  const char* rows;
  int64_t stride;  // bytes
  int64_t steps;
};

/// Lines of the next panel to bring near while a block is multiplied: `rows` of them at every step.
struct Ahead {
  const char* at;
  int64_t stride, rows;

  void fetch(int64_t step) const {
    for (int64_t row = 0; row < rows; ++row) {
      _mm_prefetch(at + row * stride + step * 64, _MM_HINT_T1);
    }
  }
};

/// sums (+)= panel x packed activations, of 32 or (kHalves 1) 16 rows.
template <int kHalves, typename Epilogue>
void multiply(const Panel& panel, const char* packed, bool is_first, char* sums, const Ahead& ahead,
              Pending<Epilogue>& pending) {
  char* const right = sums + 2 * kTileBytes;
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kHalves == 2) _tile_zero(2);
    if constexpr (kHalves == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTileBytes, 64);
    if constexpr (kHalves == 2) _tile_loadd(2, right, 64);
    if constexpr (kHalves == 2) _tile_loadd(3, right + kTileBytes, 64);
  }
  const char* low = panel.rows;
  const char* high = panel.rows + kTile * panel.stride;
  for (int64_t step = 0; step < panel.steps; ++step) {
    _tile_stream_loadd(6, packed, 64);
    if constexpr (kHalves == 2) _tile_stream_loadd(7, packed + kTileBytes, 64);
    _tile_loadd(4, low + step * 64, panel.stride);
    _tile_loadd(5, high + step * 64, panel.stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kHalves == 2) _tile_dpbf16ps(2, 4, 7);
    if constexpr (kHalves == 2) _tile_dpbf16ps(3, 5, 7);
    packed += 2 * kTileBytes;
    pending.advance();
    ahead.fetch(step);
  }
  pending.finish();  // it may read where this stores
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileBytes, 64);
  if constexpr (kHalves == 2) _tile_stored(2, right, 64);
  if constexpr (kHalves == 2) _tile_stored(3, right + kTileBytes, 64);
}

/// One thread's part of a slab of activations.
template <typename Epilogue>
class SlabProduct {
 public:
  SlabProduct(const GemmArgs& args, const Plan& plan, const Worker& worker)
      : args_(args),
        plan_(plan),
        packed_(reinterpret_cast<char*>(worker.scratch())),
        edge_(packed_ + plan.packed_bytes + worker.index() * (plan.panel_bytes + plan.sums_bytes)),
        sums_(edge_ + plan.panel_bytes) {}

  void set_rows(int64_t begin, int64_t end) { begin_ = begin, end_ = end; }

  /// Multiplies a panel's rows; `next` is the panel this thread takes up afterwards, for
  /// prefetching.
  void run(int64_t panel, int64_t next) {
    for (int64_t step = 0; step < plan_.steps; step += plan_.block_steps) {
      const bool is_last = step + plan_.block_steps >= plan_.steps;
      const char* ahead = is_last ? weight_at(next, 0) : weight_at(panel, step + plan_.block_steps);
      run_block(panel, step, is_last, ahead);
    }
  }

  void finish() { pending_.finish(); }

 private:
  const char* weight_at(int64_t panel, int64_t step) const {
    return static_cast<const char*>(args_.weight) +
           (panel * kPanel * args_.weight_stride + step * kStep) * 2;
  }

  void run_block(int64_t panel, int64_t step, bool is_last, const char* ahead) {
    const Panel block = load_panel(panel, step);
    const int64_t pairs = ceil_div(end_ - begin_, kPair);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t row = begin_ + pair * kPair;
      const int64_t rows = min(kPair, end_ - row);
      const char* packed = packed_ + (pair * plan_.steps + step) * 2 * kTileBytes;
      char* sums = sums_ + pair * 4 * kTileBytes;
      // A lone pair waits for memory only, and the hardware does that better undisturbed.
      const int64_t first = kPanel * pair / pairs;
      const int64_t last = pairs > 1 ? kPanel * (pair + 1) / pairs : 0;
      const int64_t stride = args_.weight_stride * 2;
      const Ahead lines{ahead + first * stride, stride, last - first};
      if (rows > kTile) {
        multiply<2>(block, packed, step == 0, sums, lines, pending_);
      } else {
        multiply<1>(block, packed, step == 0, sums, lines, pending_);
      }
      if (!is_last) continue;
      pending_ = {
          .args = &args_, .sums = sums, .t = row, .n = panel * kPanel, .rows = rows, .next = 0};
    }
  }

  /// The weights in place, or, at the edges of N and K, a copy that is filled up with zeros.
  Panel load_panel(int64_t panel, int64_t step) {
    const int64_t steps = min(plan_.block_steps, plan_.steps - step);
    const int64_t depth = min(steps * kStep, args_.K - step * kStep);
    const int64_t rows = min(kPanel, args_.N - panel * kPanel);
    const char* from = weight_at(panel, step);
    if (rows == kPanel && depth == steps * kStep) return {from, args_.weight_stride * 2, steps};
    for (int64_t row = 0; row < kPanel; ++row) {
      for (int64_t k = 0; k < steps * kStep; k += kStep) {
        const int64_t left = row < rows ? min(kStep, depth - k) : 0;
        const __mmask32 mask = left < kStep ? (1u << left) - 1 : ~0u;
        _mm512_store_si512(
            edge_ + row * steps * 64 + k * 2,
            _mm512_maskz_loadu_epi16(mask, from + (row * args_.weight_stride + k) * 2));
      }
    }
    asm volatile("" ::: "memory");  // tile loads are opaque to the compiler
    return {edge_, steps * 64, steps};
  }

  const GemmArgs& args_;
  const Plan& plan_;
  char* packed_;  // of all threads
  char* edge_;    // of this one, as all below
  char* sums_;    // [pairs][2][32 n][16 t] float
  int64_t begin_ = 0, end_ = 0;
  Pending<Epilogue> pending_;
};

void configure_tiles() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  const Config config;
  _tile_loadconfig(&config);
}

template <typename Epilogue>
void run(const GemmArgs& args, const Worker& worker) {
  const Plan plan(args);
  // A claim is a few panels, small enough for the threads to end together.
  const int64_t group = max(1, min(8, plan.panels / (8 * worker.width())));
  const int64_t groups = ceil_div(plan.panels, group);
  SlabProduct<Epilogue> product(args, plan, worker);
  configure_tiles();
  int64_t claim = worker.claim();
  int64_t done = 0;  // claims of earlier slabs
  for (int64_t begin = 0; begin < args.T; begin += plan.slab, done += groups) {
    const int64_t end = min(args.T, begin + plan.slab);
    if (begin > 0) worker.sync();  // until nobody reads the packed rows
    pack(args, plan, begin, end, worker, reinterpret_cast<char*>(worker.scratch()));
    worker.sync();
    product.set_rows(begin, end);
    while (claim < done + groups) {
      const int64_t next_claim = worker.claim();
      const int64_t next = next_claim < done + groups ? (next_claim - done) * group : 0;
      const int64_t first = (claim - done) * group;
      const int64_t last = min(plan.panels, first + group);
      for (int64_t panel = first; panel < last; ++panel) {
        product.run(panel, panel + 1 < last ? panel + 1 : next);
      }
      claim = next_claim;
    }
    product.finish();
  }
  _tile_release();
}

size_t scratch_bytes(const GemmArgs& args, int width) {
  const Plan plan(args);
  return static_cast<size_t>(plan.packed_bytes + width * (plan.panel_bytes + plan.sums_bytes));
}

}  // namespace

constinit const GemmKernels kGemmAmxBF16 = {.same = {run<Plain<BFloat16>>, scratch_bytes},
                                            .f32 = {run<Plain<float>>, scratch_bytes},
                                            .silu_mul = {run<SiluMul>, scratch_bytes}};

}  // namespace nanoflow::cpu
