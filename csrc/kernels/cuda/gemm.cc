#include "kernels/cuda/gemm.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "kernels/product_time.h"

namespace nanoflow::cuda {
namespace {

/// A kernel's times in bursts, fitted to bench/cuda/sweep.py, and its energy under sustained load,
/// to bench/cuda/gemm.py.
struct GemmCost {
  GemmTraits traits;
  double fixed_us;  // launch, filling the pipeline, storing the last tile; stream-K's sums
  double step_us;   // kStepDepth of K for one tile on each SM
  double wave_us;   // what a wave of tiles adds to its steps
  double sm_gbs;    // memory traffic of one SM
  double pj_flop;   // at kLoadedMhz
};

constexpr double kStepDepth = 64;
constexpr double kMemoryGbs = 2950;  // of the whole device
constexpr int kDeviceSms = 132;      // of the device that this is fitted to
/// Under sustained load the clock is what the power limit leaves: about kLoadedMhz instead of a
/// burst's kBurstMhz. A product that keeps the SMs less busy has a higher one, at which an
/// operation takes more energy: by the clock's power of kEnergyExponent.
constexpr double kWatts = 690, kBurstMhz = 1775, kLoadedMhz = 1450, kEnergyExponent = 1.5;
constexpr double kPjByte = 40;  // of memory traffic
/// Up to this many rows only kernels with tiles of as few rows are considered: the weights' traffic
/// decides, which the fit does not tell well enough.
constexpr int kFewRows = 64;
/// Above so many rows tiles of few features cost more: they read the rows from the L2 cache more
/// often than it can serve.
constexpr int kManyRows = 1024, kFewFeatures = 128;
constexpr double kManyRowsFactor = 1.1;
/// With more waves than this, an uneven last one costs less than stream-K's extra traffic and
/// power.
constexpr int kStreamKWaves = 4;

constexpr std::array<GemmCost, kNumGemmKernels> kCosts = {{
    {{"128x256", 128, 256, 2, 1, false, true}, 1.2, 0.584, 5.7, 80, 1.0},
    {{"128x192", 128, 192, 2, 1, false, false}, 2.3, 0.443, 4.3, 40, 1.05},
    {{"128x128", 128, 128, 1, 1, false, true}, 5.5, 0.306, 1.3, 56, 1.03},
    {{"128x256 stream-K", 128, 256, 2, 1, true, false}, 16.8, 0.640, 0.6, 22, 1.16},
    {{"128x128 stream-K", 128, 128, 2, 1, true, false}, 12.5, 0.377, 0.0, 20, 1.135},
    {{"64x128 stream-K", 64, 128, 1, 1, true, true}, 12.0, 0.242, 0.2, 34, 1.3},
    {{"16x128 stream-K", 16, 128, 1, 1, true, false}, 9.5, 0.158, 0.0, 40, 1.3},
    {{"128x64", 128, 64, 1, 2, false, false}, 7.3, 0.232, 0.2, 35, 1.2},
    {{"128x96 pair", 128, 96, 2, 1, false, false}, 5.5, 0.268, 1.3, 45, 1.09},
    {{"128x160", 128, 160, 2, 1, false, false}, 2.3, 0.375, 3.6, 40, 1.06},
    {{"128x128 halves", 128, 128, 1, 1, false, false, 2}, 6.8, 0.340, 1.3, 45, 1.08},
    // Pairs of columns share no weights, which takes some 8 % more energy.
    {{"128x256 columns", 128, 256, 1, 2, false, false}, 1.2, 0.584, 5.7, 80, 1.08},
    {{"128x192 columns", 128, 192, 1, 2, false, false}, 2.3, 0.443, 4.3, 40, 1.134},
    {{"128x160 columns", 128, 160, 1, 2, false, false}, 2.3, 0.375, 3.6, 40, 1.145},
    {{"128x144", 128, 144, 2, 1, false, false}, 2.3, 0.339, 5.3, 40, 1.1},
    {{"128x224", 128, 224, 2, 1, false, false}, 2.3, 0.515, 5.0, 40, 1.025},
}};

const GemmCost& cost_of(GemmKernel kernel) { return kCosts[static_cast<size_t>(kernel)]; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Of `size` in tiles, in whole clusters.
int64_t tiles_along(int size, int tile, int cluster) {
  return ceil_div(size, int64_t{tile} * cluster) * cluster;
}

/// Times the parts of each.
int64_t tiles_of(const GemmTraits& t, const GemmShape& shape) {
  return tiles_along(shape.rows, t.tile_rows, t.cluster_rows) *
         tiles_along(shape.features, t.tile_features, t.cluster_features) * t.k_parts;
}

/// Those of `tiles_of` that read anything: not what only completes a cluster.
int64_t tiles_with_work(const GemmTraits& t, const GemmShape& shape) {
  return ceil_div(shape.rows, t.tile_rows) * ceil_div(shape.features, t.tile_features) * t.k_parts;
}

/// CTAs that run at a time.
int64_t slots_of(const GemmTraits& t, int sms) {
  const int cluster = t.cluster_rows * t.cluster_features * t.k_parts;
  return int64_t{std::max(sms / cluster, 1)} * cluster;
}

bool is_pair_of_columns(const GemmTraits& t) {
  return t.cluster_features > 1 && t.tile_features > kFewFeatures;
}

bool is_candidate(GemmKernel kernel, const GemmShape& shape, int sms, const GemmType& type) {
  const GemmTraits& t = traits_of(kernel);
  // On fewer SMs than all, something runs beside a product and shares the device's power: its
  // energy counts, of which pairs of columns take more, and less the SMs that other tiles leave
  // idle.
  if (is_pair_of_columns(t) && sms < kDeviceSms) return false;
  const bool is_common = type.x == DType::kBF16 && type.out == DType::kBF16 && !type.is_silu_mul;
  if (!t.is_general && !is_common) return false;
  if (shape.rows <= kFewRows) return t.tile_rows <= kFewRows;
  if (t.k_parts > 1) return tiles_of(t, shape) <= slots_of(t, sms);  // else no SM is idle
  return !t.is_stream_k || t.tile_rows <= kFewRows ||
         tiles_of(t, shape) <= kStreamKWaves * slots_of(t, sms);
}

/// The product's least memory traffic.
double bytes_of(const GemmShape& shape) {
  const double depth = shape.depth, rows = shape.rows, features = shape.features;
  return 2 * (features * depth + rows * (depth + features));
}

/// At the clock of a burst.
double gemm_burst_us(const GemmCost& cost, const GemmShape& shape, int sms) {
  const GemmTraits& t = cost.traits;
  const int64_t slots = slots_of(t, sms), tiles = tiles_of(t, shape);
  const double waves = t.is_stream_k ? static_cast<double>(tiles) / static_cast<double>(slots)
                                     : static_cast<double>(ceil_div(tiles, slots));
  const bool is_crowded = shape.rows > kManyRows && t.tile_features <= kFewFeatures;
  const double multiply_us = (is_crowded ? kManyRowsFactor : 1.0) * waves *
                             (cost.step_us * shape.depth / kStepDepth / t.k_parts + cost.wave_us);
  const auto busy =
      static_cast<double>(t.is_stream_k ? slots : std::min(tiles_with_work(t, shape), slots));
  const double memory_us = bytes_of(shape) * 1e-3 / std::min(kMemoryGbs, busy * cost.sm_gbs);
  return cost.fixed_us + std::max(multiply_us, memory_us);
}

}  // namespace

const GemmTraits& traits_of(GemmKernel kernel) { return cost_of(kernel).traits; }

double gemm_time_us(GemmKernel kernel, const GemmShape& shape, int sms) {
  const GemmCost& cost = cost_of(kernel);
  const double depth = shape.depth, rows = shape.rows, features = shape.features;
  const double burst_us = gemm_burst_us(cost, shape, sms);
  const double picojoules = 2 * rows * features * depth * cost.pj_flop + bytes_of(shape) * kPjByte;
  const double energy_us = picojoules / kWatts * 1e-6;  // at kLoadedMhz
  // Watts x time = energy x (cycles / time / kLoadedMhz) ^ kEnergyExponent
  const double loaded_us = burst_us * kBurstMhz / kLoadedMhz;
  const double sustained_us =
      std::pow(energy_us * std::pow(loaded_us, kEnergyExponent), 1 / (1 + kEnergyExponent));
  return std::max(burst_us, sustained_us);
}

GemmKernel choose_gemm(const GemmShape& shape, int sms, const GemmType& type) {
  GemmKernel best = GemmKernel::k128x256;
  double best_us = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kNumGemmKernels; ++i) {
    const auto kernel = static_cast<GemmKernel>(i);
    if (!is_candidate(kernel, shape, sms, type)) continue;
    const double us = gemm_time_us(kernel, shape, sms);
    if (us < best_us) {
      best = kernel;
      best_us = us;
    }
  }
  return best;
}

}  // namespace nanoflow::cuda

namespace nanoflow {

double cuda_gemm_us(int rows, int features, int depth, int sms, bool is_general) {
  NF_CHECK(rows > 0 && features > 0 && depth > 0 && sms > 0, "a product of ", rows, " rows, ",
           features, " features and depth ", depth, " on ", sms, " SMs: all must be positive");
  const cuda::GemmShape shape{.rows = rows, .features = features, .depth = depth};
  const cuda::GemmType type{.x = DType::kBF16, .out = DType::kBF16, .is_silu_mul = is_general};
  return cuda::gemm_burst_us(cuda::cost_of(cuda::choose_gemm(shape, sms, type)), shape, sms);
}

}  // namespace nanoflow
