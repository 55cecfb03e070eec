#pragma once

// From products to weights, for attention with matrix tiles; include math_amx.h first. Only for
// files that are compiled for this instruction set, hence the anonymous namespace.
//
// Up to 16 queries make a wide tile: lanes of a vector are queries. Up to four make a narrow one:
// lane 4 g + q is query q with a key of the g-th 16 of a block. Both sum a query's weights in one
// order (those of each 16 keys in turn, then the four sums), so it is one query, one result.

#include "kernels/cpu/attention_parts.h"

namespace nanoflow::cpu {
namespace {

constexpr int kNarrow = 4;
constexpr int kKeyTiles = kKeyBlock / kTileRows;
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -1e30f;  // a maximum below any other, and finite

/// The products of a block with 16 queries, and what becomes of them.
struct TileWeights {
  float* products;  // [kKeyBlock, 16]; wide tiles leave weights in bfloat16 [kKeyBlock / 2, 16, 2]
  BFloat16* weights;  // [16, kKeyBlock]
  float* factors;     // [16] what earlier sums are to be multiplied by
  Softmax softmax;    // [16] highest products in units of log2, sums of weights
  Vec unit;           // log2 of a weight per product
};

/// 2^x for x <= 0 within 5e-5 of it, a fortieth of what rounding to bfloat16 changes: Taylor's
/// series to the fourth power for the fraction.
inline Vec power_of_two(Vec x) {
  constexpr float kLn2 = 0.693147181f;
  const Vec n = round_to_integer(x);
  const Vec f = x - n;
  Vec p = splat(kLn2 * kLn2 * kLn2 * kLn2 / 24);
  p = fma(p, f, splat(kLn2 * kLn2 * kLn2 / 6));
  p = fma(p, f, splat(kLn2 * kLn2 / 2));
  p = fma(p, f, splat(kLn2));
  return times_power_of_two(fma(p, f, splat(1.0f)), n);
}

/// Which lanes see key j.
struct SomeSee {
  __m512i begin, end;  // of the keys that each lane sees
  __mmask16 operator()(int j) const {
    const __m512i key = _mm512_set1_epi32(j);
    return _mm512_mask_cmple_epi32_mask(_mm512_cmpgt_epi32_mask(end, key), begin, key);
  }
};
struct AllSee {
  __mmask16 operator()(int) const { return 0xffff; }
};

/// Weights of two keys as pairs of bfloat16.
inline __m512i pair_weights(Vec even, Vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
}

template <typename Sees>
Vec weigh_product(Vec product, Vec unit, Vec top, Sees sees, int j) {
  return _mm512_maskz_mov_ps(sees(j), power_of_two(_mm512_fmsub_ps(product, unit, top)));
}

/// Turns the pairs of weights [n / 2, 16] of `count` queries to [16, keys], 0 from key n on.
inline void turn_weights(const TileWeights& w, int count, int n) {
  const int pairs = (n + 1) / 2;
  const int padded = (pairs + kTileRows - 1) / kTileRows * kTileRows;
  for (int pair = pairs; pair < padded; ++pair) store(w.products + pair * kTileFloats, splat(0.0f));
  for (int pair = 0; pair < padded; pair += kTileRows) {
    for (int i = 0; i < count; i += 4) {
      Vec turned[4];
      transpose_16x4(w.products + pair * kTileFloats + i, kTileFloats * 4, turned);
      for (int c = 0; c < 4; ++c) {
        store(reinterpret_cast<float*>(w.weights + (i + c) * kKeyBlock + 2 * pair), turned[c]);
      }
    }
  }
}

/// Weighs n keys for 16 queries. Calls fetch() for every two keys.
template <typename Sees, typename Fetch>
void weigh_wide(const TileWeights& w, int n, Sees sees, const Fetch& fetch) {
  Vec best[4];
  for (Vec& x : best) x = splat(-__builtin_inff());
  const int padded = (n + 3) / 4 * 4;
  for (int j = 0; j < padded; j += 4) {
    for (int i = 0; i < 4; ++i) {
      best[i] = _mm512_mask_max_ps(best[i], sees(j + i), best[i],
                                   load(w.products + (j + i) * kTileFloats));
    }
  }
  const Vec earlier = load(w.softmax.highest);
  const Vec top = max(earlier, max(max(best[0], best[1]), max(best[2], best[3])) * w.unit);
  Vec total[kKeyTiles];
  for (int tile = 0; tile < kKeyTiles; ++tile) {
    Vec own = splat(0.0f);
    const int end = n < (tile + 1) * kTileRows ? n : (tile + 1) * kTileRows;
    for (int j = tile * kTileRows; j < end; j += 2) {
      fetch();
      const float* products = w.products + j * kTileFloats;
      const Vec even = weigh_product(load(products), w.unit, top, sees, j);
      const Vec odd = weigh_product(load(products + kTileFloats), w.unit, top, sees, j + 1);
      own = own + even + odd;
      _mm512_store_si512(w.products + j / 2 * kTileFloats, pair_weights(even, odd));
    }
    total[tile] = own;
  }
  const Vec sum = (total[0] + total[1]) + (total[2] + total[3]);
  const Vec factor = power_of_two(earlier - top);
  store(w.factors, factor);
  store(w.softmax.highest, top);
  store(w.softmax.total, fma(load(w.softmax.total), factor, sum));
}

/// The same value of all four groups of lanes.
inline Vec repeated(const float* four) { return _mm512_broadcast_f32x4(_mm_loadu_ps(four)); }
inline Vec swap_neighbours(Vec x) { return _mm512_shuffle_f32x4(x, x, 0xb1); }
inline Vec swap_halves(Vec x) { return _mm512_shuffle_f32x4(x, x, 0x4e); }

/// Pairs of 16 keys for four queries, lane 4 g + q of pairs[i] being keys 16 g + 2 i, to a row of
/// keys for each query.
inline void turn_narrow(const __m512i (&pairs)[kTileRows / 2], BFloat16* weights) {
  __m512i part[2][4];  // 128-bit lane g of part[h][q]: keys 16 g + 8 h to 16 g + 8 h + 7
  for (int h = 0; h < 2; ++h) {
    const __m512i* in = pairs + 4 * h;
    const __m512i a = _mm512_unpacklo_epi32(in[0], in[1]);
    const __m512i b = _mm512_unpackhi_epi32(in[0], in[1]);
    const __m512i c = _mm512_unpacklo_epi32(in[2], in[3]);
    const __m512i d = _mm512_unpackhi_epi32(in[2], in[3]);
    part[h][0] = _mm512_unpacklo_epi64(a, c);
    part[h][1] = _mm512_unpackhi_epi64(a, c);
    part[h][2] = _mm512_unpacklo_epi64(b, d);
    part[h][3] = _mm512_unpackhi_epi64(b, d);
  }
  const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (int q = 0; q < kNarrow; ++q) {
    BFloat16* row = weights + q * kKeyBlock;
    _mm512_store_si512(row, _mm512_permutex2var_epi64(part[0][q], low, part[1][q]));
    _mm512_store_si512(row + 32, _mm512_permutex2var_epi64(part[0][q], high, part[1][q]));
  }
}

/// Weighs a whole block for four queries. Calls fetch() for every two keys of 16.
template <typename Sees, typename Fetch>
void weigh_narrow(const TileWeights& w, Sees sees, const Fetch& fetch) {
  Vec products[kTileRows];
  Vec best = splat(-__builtin_inff());
#pragma GCC unroll 16
  for (int j = 0; j < kTileRows; ++j) {
    const auto part = [&](int tile) {
      return _mm_loadu_ps(w.products + (tile * kTileRows + j) * kTileFloats);
    };
    products[j] = _mm512_castps128_ps512(part(0));
    products[j] = _mm512_insertf32x4(products[j], part(1), 1);
    products[j] = _mm512_insertf32x4(products[j], part(2), 2);
    products[j] = _mm512_insertf32x4(products[j], part(3), 3);
    best = _mm512_mask_max_ps(best, sees(j), best, products[j]);
  }
  best = max(best, swap_neighbours(best));
  best = max(best, swap_halves(best));
  const Vec earlier = repeated(w.softmax.highest);
  const Vec top = max(earlier, best * w.unit);
  Vec total = splat(0.0f);
  __m512i pairs[kTileRows / 2];
#pragma GCC unroll 8
  for (int j = 0; j < kTileRows; j += 2) {
    fetch();
    const Vec even = weigh_product(products[j], w.unit, top, sees, j);
    const Vec odd = weigh_product(products[j + 1], w.unit, top, sees, j + 1);
    total = total + even + odd;
    pairs[j / 2] = pair_weights(even, odd);
  }
  total = total + swap_neighbours(total);
  total = total + swap_halves(total);
  turn_narrow(pairs, w.weights);
  const Vec factor = power_of_two(earlier - top);
  store(w.factors, factor, kNarrow);
  store(w.softmax.highest, top, kNarrow);
  store(w.softmax.total, fma(repeated(w.softmax.total), factor, total), kNarrow);
}

/// The keys of a block that 16 queries see: nothing where they end before they begin.
struct Visible {
  int begin[kTileRows], end[kTileRows];
};

/// Weighs n keys of a block for `count` queries; weights of keys that a query does not see are 0.
template <typename Fetch>
void weigh(const TileWeights& w, int count, int n, const Visible& visible, const Fetch& fetch) {
  // The first ends first, the last begins last.
  const bool is_whole = visible.end[0] == n && visible.begin[count - 1] == 0;
  if (count > kNarrow) {
    if (is_whole && n % kTileRows == 0) {
      weigh_wide(w, n, AllSee{}, fetch);
    } else {
      const SomeSee some{_mm512_loadu_si512(visible.begin), _mm512_loadu_si512(visible.end)};
      weigh_wide(w, n, some, fetch);
    }
    turn_weights(w, count, n);
  } else if (is_whole && n == kKeyBlock) {
    weigh_narrow(w, AllSee{}, fetch);
  } else {
    const __m512i group = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const auto of_groups = [&](const int* keys) {
      const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys));
      return _mm512_sub_epi32(_mm512_broadcast_i32x4(four), _mm512_slli_epi32(group, 4));
    };
    weigh_narrow(w, SomeSee{of_groups(visible.begin), of_groups(visible.end)}, fetch);
  }
}

}  // namespace
}  // namespace nanoflow::cpu
