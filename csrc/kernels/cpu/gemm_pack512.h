#pragma once

// Activations as tiles of 16 pairs of k x 16 rows, and sums of 32 weight rows on their way to out;
// include a math_<isa>.h with bfloat16 instructions first. Only for files that are compiled for one
// instruction set, hence the anonymous namespace.

#include "kernels/cpu/gemm_epilogue.h"
#include "kernels/cpu/math_transpose512.h"

namespace nanoflow::cpu {
namespace {

constexpr int64_t kTile = 16;  // t of an activation tile
constexpr int64_t kStep = 32;  // k of a tile
constexpr int64_t kTileBytes = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/// Packs one tile, so that pairs of k lie side by side, pair i at place(i); `rows` x `depth`
/// elements exist, the rest becomes zero.
template <typename Place>
void pack_tile(const BFloat16* x, int64_t stride, int64_t rows, int64_t depth, Place place) {
  alignas(64) BFloat16 edge[kTile * kStep];
  if (rows < kTile || depth < kStep) {
    const __mmask32 mask = depth < kStep ? (1u << depth) - 1 : ~0u;
    for (int64_t row = 0; row < kTile; ++row) {
      _mm512_store_si512(edge + row * kStep, row < rows
                                                 ? _mm512_maskz_loadu_epi16(mask, x + row * stride)
                                                 : _mm512_setzero_si512());
    }
    x = edge;
    stride = kStep;
  }
  for (int group = 0; group < 4; ++group) {
    Vec pairs[4];
    transpose_16x4(x + group * 8, stride * 2, pairs);
    for (int i = 0; i < 4; ++i) _mm512_store_ps(place(group * 4 + i), pairs[i]);
  }
}

/// Both write what the first `columns` of 32 sums of row t, from weight row n on, become.
template <typename Out>
struct Plain {
  static void store(const GemmArgs& args, int64_t t, int64_t n, Vec low, Vec high, int columns) {
    store_sums<Out>(args, t, n, low, columns < kTile ? columns : kTile);
    if (columns > kTile) store_sums<Out>(args, t, n + kTile, high, columns - kTile);
  }
};

struct SiluMul {
  static_assert(2 * GemmSiluMul::kGroup == kTile);

  static void store(const GemmArgs& args, int64_t t, int64_t n, Vec low, Vec high, int columns) {
    const Vec gate = _mm512_shuffle_f32x4(low, high, 0x44);
    const Vec up = _mm512_shuffle_f32x4(low, high, 0xee);
    store_sums<BFloat16>(args, t, n / 2, activated(args.activation, gate) * up, columns / 2);
  }
};

}  // namespace
}  // namespace nanoflow::cpu
