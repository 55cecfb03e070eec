#pragma once

#include <cstdint>

#include "kernels/cpu/gemm_epilogue.h"

// GEMM from dot products: x and weight are read as they lie, vectors run along k, and a tile of
// sums stays in registers. Nothing is packed, so few rows cost little.
//
// A Simd says how one instruction set does it for one dtype:
//   Element, Sum           what is read; a vector of partial sums
//   Operand                kChunk elements made ready to multiply
//   kRows, kColumns        the tile of sums: activation rows x weight rows
//   load(p), load_part(p, count)   whole or, at the end of K, filled up with zeros
//   multiply_add(sum, x, w)
//   reduce(sums, out)      [kRows][kColumns] sums to as many floats, added up in one order for all
// Include one of math_<isa>.h first. Only for files that are compiled for one instruction set,
// hence the anonymous namespace.

namespace nanoflow::cpu {
namespace {

/// Elements of K whose products are added up before they are added to those of other blocks: even
/// parts of at most 1024, whole vectors of every instruction set.
inline int64_t block_depth(int64_t K) {
  constexpr int64_t kVector = 32, kMost = 1024 / kVector;
  const int64_t vectors = (K + kVector - 1) / kVector;
  const int64_t blocks = (vectors + kMost - 1) / kMost;
  return blocks == 0 ? kVector : (vectors + blocks - 1) / blocks * kVector;
}

/// With kIsSiluMul the weight holds groups of gate and up rows, and a column of out takes a row of
/// each.
template <typename Simd, typename Out, bool kIsSiluMul = false>
class DotGemm {
 public:
  static void run(const GemmArgs& args, const Worker& worker) {
    const DotGemm gemm(args);
    const int64_t chunk = gemm.chunk_columns(worker.width());
    const int64_t columns = args.N / kParts;
    for (int64_t n = worker.claim() * chunk; n < columns; n = worker.claim() * chunk) {
      const int64_t end = n + chunk < columns ? n + chunk : columns;
      for (int64_t t = 0; t < args.T; t += gemm.slab_) {
        gemm.multiply(t, t + gemm.slab_ < args.T ? t + gemm.slab_ : args.T, n, end);
      }
    }
  }

 private:
  using Element = typename Simd::Element;
  using Sum = typename Simd::Sum;
  static constexpr int kRows = Simd::kRows, kColumns = Simd::kColumns;
  static constexpr int kTile = kRows * kColumns;
  static constexpr int kParts = kIsSiluMul ? 2 : 1;  // weight rows for a column of out
  static constexpr int kGroup = GemmSiluMul::kGroup;
  static_assert(kGroup % kColumns == 0 && kTile % kLanes == 0 && kColumns <= kLanes);
  static constexpr int64_t kSlabBytes = 256 << 10;   // activations, for the second cache
  static constexpr int64_t kChunkBytes = 128 << 10;  // weights, beside them
  static constexpr int64_t kBlockBytes = 20 << 10;   // weights, for the first cache

  explicit DotGemm(const GemmArgs& args)
      : args_(args), block_(block_depth(args.K)), slab_(tiles_in(kSlabBytes, kRows)) {}

  /// Rows of K elements that fit, in whole tiles, at least one.
  int64_t tiles_in(int64_t bytes, int64_t rows) const {
    const int64_t tiles = bytes / (args_.K * static_cast<int64_t>(sizeof(Element))) / rows;
    return (tiles > 0 ? tiles : 1) * rows;
  }

  /// Columns of out that a thread takes at a time: enough chunks for all threads to end together.
  int64_t chunk_columns(int width) const {
    const int64_t largest = tiles_in(kChunkBytes / kParts, kColumns);
    const int64_t even = args_.N / kParts / (8 * width) / kColumns * kColumns;
    return even < kColumns ? kColumns : even < largest ? even : largest;
  }

  void multiply(int64_t t_begin, int64_t t_end, int64_t n_begin, int64_t n_end) const {
    const int64_t block = tiles_in(kBlockBytes / kParts, kColumns);
    for (int64_t n = n_begin; n < n_end; n += block) {
      const int64_t end = n + block < n_end ? n + block : n_end;
      int64_t t = t_begin;
      for (; t + kRows <= t_end; t += kRows) tiles<kRows>(t, n, end);
      remainder<kRows - 1>(t, t_end - t, n, end);
    }
  }

  template <int kCount>
  void remainder(int64_t t, int64_t rows, int64_t n_begin, int64_t n_end) const {
    if constexpr (kCount > 0) {
      if (rows == kCount) return tiles<kCount>(t, n_begin, n_end);
      remainder<kCount - 1>(t, rows, n_begin, n_end);
    }
  }

  template <int kCount>
  void tiles(int64_t t, int64_t n_begin, int64_t n_end) const {
    for (int64_t n = n_begin; n < n_end; n += kColumns) {
      tile<kCount>(t, n, static_cast<int>(n_end - n < kColumns ? n_end - n : kColumns));
    }
  }

  /// kCount rows of up to kColumns columns of out.
  template <int kCount>
  void tile(int64_t t, int64_t n, int columns) const {
    alignas(64) float values[kTile];
    if constexpr (kIsSiluMul) {
      const int64_t gate = n / kGroup * 2 * kGroup + n % kGroup;
      alignas(64) float up[kTile];
      dot<kCount>(t, gate, columns, values);
      dot<kCount>(t, gate + kGroup, columns, up);
      for (int i = 0; i < kTile; i += kLanes) {
        store(values + i, activated(args_.activation, load(values + i)) * load(up + i));
      }
    } else {
      dot<kCount>(t, n, columns, values);
    }
    for (int i = 0; i < kCount; ++i) {
      store_sums<Out>(args_, t + i, n, load(values + i * kColumns, columns), columns);
    }
  }

  /// kCount rows times up to kColumns weight rows; those beyond `columns` repeat the last.
  template <int kCount>
  void dot(int64_t t, int64_t n, int columns, float* values) const {
    const Element* x[kCount];
    const Element* w[kColumns];
    for (int i = 0; i < kCount; ++i) {
      x[i] = static_cast<const Element*>(args_.x) + (t + i) * args_.x_stride;
    }
    for (int j = 0; j < kColumns; ++j) {
      const int64_t row = n + (j < columns ? j : columns - 1);
      w[j] = static_cast<const Element*>(args_.weight) + row * args_.weight_stride;
    }
    dot_block<kCount>(x, w, 0, values);
    for (int64_t begin = block_; begin < args_.K; begin += block_) {
      alignas(64) float more[kTile];
      dot_block<kCount>(x, w, begin, more);
      for (int i = 0; i < kTile; i += kLanes) store(values + i, load(values + i) + load(more + i));
    }
  }

  /// The same for a block of K.
  template <int kCount>
  [[gnu::always_inline]] void dot_block(const Element* const* x, const Element* const* w,
                                        int64_t begin, float* values) const {
    Sum sums[kTile] = {};
    const int64_t end = begin + block_ < args_.K ? begin + block_ : args_.K;
    int64_t k = begin;
    for (; k + Simd::kChunk <= end; k += Simd::kChunk) {
      step<kCount>(
          sums, [&](int i) { return Simd::load(x[i] + k); },
          [&](int j) { return Simd::load(w[j] + k); });
    }
    if (const int rest = static_cast<int>(end - k); rest > 0) {
      step<kCount>(
          sums, [&](int i) { return Simd::load_part(x[i] + k, rest); },
          [&](int j) { return Simd::load_part(w[j] + k, rest); });
    }
    Simd::reduce(sums, values);
  }

  template <int kCount, typename LoadX, typename LoadW>
  [[gnu::always_inline]] static void step(Sum* sums, LoadX load_x, LoadW load_w) {
    typename Simd::Operand x[kCount];
    for (int i = 0; i < kCount; ++i) x[i] = load_x(i);
    for (int j = 0; j < kColumns; ++j) {
      const typename Simd::Operand w = load_w(j);
      for (int i = 0; i < kCount; ++i) Simd::multiply_add(sums[i * kColumns + j], x[i], w);
    }
  }

  const GemmArgs& args_;
  const int64_t block_;  // of K
  const int64_t slab_;   // activation rows that stay in the second cache
};

template <typename Simd>
constexpr GemmKernels dot_kernels() {
  using Element = typename Simd::Element;
  constexpr auto no_scratch = [](const GemmArgs&, int) -> size_t { return 0; };
  return {.same = {DotGemm<Simd, Element>::run, no_scratch},
          .f32 = {DotGemm<Simd, float>::run, no_scratch},
          .silu_mul = {DotGemm<Simd, Element, true>::run, no_scratch}};
}

}  // namespace
}  // namespace nanoflow::cpu
