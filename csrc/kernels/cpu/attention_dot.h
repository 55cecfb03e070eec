#pragma once

// Attention on bfloat16 with dot products of pairs; include math_avx512_bf16.h first. Only for
// files that are compiled for this instruction set, hence the anonymous namespace.
//
// A query is multiplied with keys as they lie in the cache. Its weights are rounded to bfloat16,
// and multiplied with values of which two keys lie side by side.

#include "kernels/cpu/attention_loops.h"
#include "kernels/cpu/math_transpose512.h"

namespace nanoflow::cpu {
namespace {

constexpr int64_t kPart = 32;  // bfloat16 in a vector

/// A tile's buffers. Heads are padded with zeros to whole vectors of bfloat16.
struct DotBuffers {
  int64_t width;
  float* sums;        // [rows * group, width]
  BFloat16* values;   // [kKeyBlock / 2, width, 2]
  BFloat16* edges;    // [2, width, 2] first and last key of a row, where it sees half of a pair
  float* products;    // [group, kKeyBlock]; then weights
  BFloat16* weights;  // [group, kKeyBlock]
  float* factors;     // [group]
  Softmax softmax;    // [rows * group]
  size_t bytes;

  DotBuffers(std::byte* scratch, int rows, int group, int head_dim) {
    ScratchPieces pieces(scratch);
    const int64_t queries = static_cast<int64_t>(rows) * group;
    width = (head_dim + kPart - 1) / kPart * kPart;
    sums = pieces.take<float>(queries * width);
    values = pieces.take<BFloat16>(kKeyBlock * width);
    edges = pieces.take<BFloat16>(4 * width);
    products = pieces.take<float>(static_cast<int64_t>(group) * kKeyBlock);
    weights = pieces.take<BFloat16>(static_cast<int64_t>(group) * kKeyBlock);
    factors = pieces.take<float>(group);
    softmax = {pieces.take<float>(queries), pieces.take<float>(queries)};
    bytes = pieces.bytes();
  }
};

/// A vector of the `left` elements from here to the end of a head.
inline __m512i load_part(const BFloat16* from, int64_t left) {
  return left >= kPart ? _mm512_loadu_si512(from)
                       : _mm512_maskz_loadu_epi16((1u << left) - 1, from);
}

inline Vec add_dots(Vec sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

/// Lays the values of two keys side by side; null are zeros.
inline void pair_values(const BFloat16* even, const BFloat16* odd, int64_t D, BFloat16* to) {
  const auto part = [D](const BFloat16* value, int64_t d) {
    return value == nullptr ? _mm512_setzero_si512() : load_part(value + d, D - d);
  };
  for (int64_t d = 0; d < D; d += kPart) store_pairs(part(even, d), part(odd, d), to + 2 * d);
}

template <typename T>
void start(const AttentionTile& tile, const DotBuffers& b) {
  clear(tile, b);
}

/// Pairs the values of a block, and asks for half of as many of the next keys and values meanwhile.
inline void load_block(const BlockRows<BFloat16>& rows, const DotBuffers& b, int64_t D,
                       Ahead<BFloat16>& ahead) {
  for (int j = 0; j < rows.n; j += 2) {
    const BFloat16* odd = j + 1 < rows.n ? rows.v[j + 1] : nullptr;
    pair_values(rows.v[j], odd, D, b.values + j * b.width);
    ahead.fetch();
  }
}

/// sums += products of a part of kQueries queries, D apart, with that of four keys.
template <int kQueries, typename LoadPart>
[[gnu::always_inline]] inline void add_products(const BFloat16* q, int64_t D,
                                                const BFloat16* const* keys, int64_t d,
                                                const LoadPart& part, Vec (&sums)[kQueries][4]) {
  __m512i query[kQueries];
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) query[i] = part(q + i * D + d);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i key = part(keys[j] + d);
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) sums[i][j] = add_dots(sums[i][j], query[i], key);
  }
}

/// products[i][j] = query i · key j for the whole vectors that hold keys [begin, n). Heads have
/// kParts vectors, or where that is 0 as many as D takes.
template <int kQueries, int kParts>
void multiply_keys(const BFloat16* q, int64_t D, const BlockRows<BFloat16>& rows, int begin, int n,
                   float* products) {
  for (int first = begin - begin % kLanes; first < n; first += kLanes) {
    Vec fours[kQueries][4];
#pragma GCC unroll 4
    for (int four = 0; four < 4; ++four) {
      const BFloat16* keys[4];
      for (int j = 0; j < 4; ++j) {
        const int key = first + 4 * four + j;
        keys[j] = rows.k[key < n ? key : n - 1];
      }
      Vec sums[kQueries][4] = {};
      if constexpr (kParts > 0) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const auto whole = [](const BFloat16* p) { return _mm512_loadu_si512(p); };
          add_products(q, D, keys, part * kPart, whole, sums);
        }
      } else {
        for (int64_t d = 0; d < D; d += kPart) {
          const auto rest = [=](const BFloat16* p) { return load_part(p, D - d); };
          add_products(q, D, keys, d, rest, sums);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) fours[i][four] = sums_of_four(sums[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      store(products + i * kKeyBlock + first,
            sums_of_parts(sums_of_parts(fours[i][0], fours[i][1]),
                          sums_of_parts(fours[i][2], fours[i][3])));
    }
  }
}

template <int kQueries>
void multiply_keys(const BFloat16* q, int64_t D, const BlockRows<BFloat16>& rows, int begin, int n,
                   float* products) {
  if (D == 2 * kPart) return multiply_keys<kQueries, 2>(q, D, rows, begin, n, products);
  if (D == 4 * kPart) return multiply_keys<kQueries, 4>(q, D, rows, begin, n, products);
  multiply_keys<kQueries, 0>(q, D, rows, begin, n, products);
}

/// Pairs of values that a row sees, of a block.
struct Pairs {
  int begin, end;                   // those in the buffer
  const BFloat16* first = nullptr;  // of the pair before them, where only its second key is seen
  const BFloat16* last = nullptr;   // of the pair after them, where only its first key is
};

inline Pairs pairs_of(const DotBuffers& b, const BlockRows<BFloat16>& rows, int64_t D, int begin,
                      int n) {
  Pairs pairs{.begin = (begin + 1) / 2, .end = n == rows.n ? (n + 1) / 2 : n / 2};
  if (begin % 2 == 1) {
    pair_values(nullptr, rows.v[begin], D, b.edges);
    pairs.first = b.edges;
  }
  if (n % 2 == 1 && n < rows.n) {
    BFloat16* last = b.edges + 2 * b.width;
    pair_values(rows.v[n - 1], nullptr, D, last);
    pairs.last = last;
  }
  return pairs;
}

/// sums = sums * factor + weights · values for kQueries queries and kVectors vectors of a head.
template <int kQueries, int kVectors>
void add_values(const DotBuffers& b, const Pairs& pairs, const BFloat16* weights,
                const float* factors, int64_t column, float* sums) {
  Vec total[kQueries][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      total[i][c] = load(sums + i * b.width + column + c * kLanes) * splat(factors[i]);
    }
  }
  const auto add = [&](const BFloat16* values, int pair) __attribute__((always_inline)) {
    __m512i value[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      value[c] = _mm512_loadu_si512(values + 2 * (column + c * kLanes));
    }
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      int both;
      __builtin_memcpy(&both, weights + i * kKeyBlock + 2 * pair, sizeof both);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        total[i][c] = add_dots(total[i][c], value[c], _mm512_set1_epi32(both));
      }
    }
  };
  if (pairs.first != nullptr) add(pairs.first, pairs.begin - 1);
  for (int pair = pairs.begin; pair < pairs.end; ++pair) {
    add(b.values + 2 * pair * b.width, pair);
  }
  if (pairs.last != nullptr) add(pairs.last, pairs.end);
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      store(sums + i * b.width + column + c * kLanes, total[i][c]);
    }
  }
}

/// kQueries of a row's, from the i-th on, against keys [begin, n) of a block.
template <int kQueries>
void attend_queries(const AttentionTile& tile, const DotBuffers& b, const BlockRows<BFloat16>& rows,
                    const Pairs& pairs, int row, int i, int begin, int n, Ahead<BFloat16>& ahead) {
  const int64_t D = tile.head_dim;
  const BFloat16* q = static_cast<const BFloat16*>(tile.q) + row * tile.q_stride + i * D;
  float* products = b.products + i * kKeyBlock;
  multiply_keys<kQueries>(q, D, rows, begin, n, products);
  for (int query = i; query < i + kQueries; ++query, products += kKeyBlock) {
    const int number = row * tile.group + query;
    b.factors[query] = soften(products, begin, n, tile.scale, b.softmax, number);
    for (int j = begin - begin % kLanes; j < n; j += kLanes) {
      store(b.weights + query * kKeyBlock + j, load(products + j));
    }
    ahead.keep_up_with(tile, number);
  }
  float* sums = b.sums + (row * tile.group + i) * b.width;
  const BFloat16* weights = b.weights + i * kKeyBlock;
  int64_t column = 0;
  for (; column + 4 * kLanes <= b.width; column += 4 * kLanes) {
    add_values<kQueries, 4>(b, pairs, weights, b.factors + i, column, sums);
  }
  if (column < b.width) add_values<kQueries, 2>(b, pairs, weights, b.factors + i, column, sums);
}

template <typename T>
void attend_row(const AttentionTile& tile, const DotBuffers& b, const BlockRows<T>& rows, int row,
                int begin, int n, Ahead<T>& ahead) {
  const Pairs pairs = pairs_of(b, rows, tile.head_dim, begin, n);
  int i = 0;
  const auto attend_some = [&]<int kQueries>() {
    attend_queries<kQueries>(tile, b, rows, pairs, row, i, begin, n, ahead);
  };
  for (; i + 4 <= tile.group; i += 4) attend_some.template operator()<4>();
  if (tile.group - i == 1) attend_some.template operator()<1>();
  if (tile.group - i == 2) attend_some.template operator()<2>();
  if (tile.group - i == 3) attend_some.template operator()<3>();
}

constexpr AttentionLoops kDotAttentionLoops{&tile_rows, &attend_scratch<DotBuffers>,
                                            &attend<BFloat16, DotBuffers>};

}  // namespace
}  // namespace nanoflow::cpu
