#pragma once

// Attention with float vectors; include one of math_<isa>.h first. Only for files that are compiled
// for one instruction set, hence the anonymous namespace.

#include "kernels/cpu/attention_parts.h"

namespace nanoflow::cpu {
namespace {

constexpr int kTileQueries = 64;                      // rows * group of a full tile, about
constexpr int kQueriesAtOnce = 4;                     // that share a load of values
constexpr int kVectorsAtOnce = kLanes == 16 ? 4 : 2;  // of a head, as registers allow

inline int tile_rows(int group) { return group < kTileQueries ? kTileQueries / group : 1; }

/// A tile's buffers. Heads are padded with zeros to `width` floats, whole vectors.
struct TileBuffers {
  int64_t width;
  float *q, *sums;  // [rows * group, width]
  float* keys;      // [kKeyBlock / kLanes, width / kLanes, kLanes keys, kLanes]
  float* values;    // [kKeyBlock, width]
  float* weights;   // [group, kKeyBlock]
  float* factors;   // [group]
  Softmax softmax;  // [rows * group]
  size_t bytes;

  TileBuffers(std::byte* scratch, int rows, int group, int head_dim) {
    ScratchPieces pieces(scratch);
    const int64_t queries = static_cast<int64_t>(rows) * group;
    width = (head_dim + kLanes - 1) / kLanes * kLanes;
    q = pieces.take<float>(queries * width);
    sums = pieces.take<float>(queries * width);
    keys = pieces.take<float>(kKeyBlock * width);
    values = pieces.take<float>(kKeyBlock * width);
    weights = pieces.take<float>(static_cast<int64_t>(group) * kKeyBlock);
    factors = pieces.take<float>(group);
    softmax = {pieces.take<float>(queries), pieces.take<float>(queries)};
    bytes = pieces.bytes();
  }
};

template <typename Buffers>
size_t attend_scratch(int group, int head_dim) {
  return Buffers(nullptr, tile_rows(group), group, head_dim).bytes;
}

/// Copies a head as floats to vectors that lie `step` vectors apart.
template <int step, typename T>
void widen(const T* from, int64_t D, float* to) {
  for_vectors(D, [=](int64_t d, auto n) { store(to + d * step, load(from + d, n)); });
}

/// Where key j of a block begins.
inline float* key_at(const TileBuffers& b, int j) {
  return b.keys + (j - j % kLanes) * b.width + j % kLanes * kLanes;
}

/// Nothing has been attended to yet.
template <typename Buffers>
void clear(const AttentionTile& tile, const Buffers& b) {
  for (int i = 0; i < tile.rows * tile.group; ++i) {
    b.softmax.highest[i] = -__builtin_inff();
    b.softmax.total[i] = 0.0f;
  }
  const int64_t floats = tile.rows * tile.group * b.width;
  for (int64_t i = 0; i < floats; i += kLanes) store(b.sums + i, splat(0.0f));
}

template <typename T>
void start(const AttentionTile& tile, const TileBuffers& b) {
  clear(tile, b);
  for (int row = 0; row < tile.rows; ++row) {
    const T* q = static_cast<const T*>(tile.q) + row * tile.q_stride;
    for (int i = 0; i < tile.group; ++i) {
      widen<1>(q + i * tile.head_dim, tile.head_dim, b.q + (row * tile.group + i) * b.width);
    }
  }
}

/// Widens the keys and values of a block into the tile's buffers, and asks for half of those of the
/// next meanwhile. The keys that fill the last vector of products are zero.
template <typename T>
void load_block(const BlockRows<T>& rows, const TileBuffers& b, int64_t D, Ahead<T>& ahead) {
  for (int i = 0; i < rows.n; ++i) {
    widen<kLanes>(rows.k[i], D, key_at(b, i));
    widen<1>(rows.v[i], D, b.values + i * b.width);
    ahead.keep_up(i + 1, 2 * rows.n);
  }
  for (int j = rows.n; j % kLanes != 0; ++j) {
    for (int64_t d = 0; d < b.width; d += kLanes) store(key_at(b, j) + d * kLanes, splat(0.0f));
  }
}

/// products[j] = q · key j for the whole vectors that hold keys [begin, n).
inline void multiply_keys(const float* q, const TileBuffers& b, int begin, int n, float* products) {
  for (int j = begin - begin % kLanes; j < n; j += kLanes) {
    const float* keys = key_at(b, j);
    Vec partial[kLanes] = {};
    for (int64_t d = 0; d < b.width; d += kLanes) {
      const Vec a = load(q + d);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        partial[i] = fma(a, load(keys + d * kLanes + i * kLanes), partial[i]);
      }
    }
    store(products + j, sums(partial));
  }
}

/// Turns the products [begin, n) of a query into weights relative to the new maximum; the rest of
/// their vectors becomes 0. Returns what earlier weights are to be multiplied by.
inline float soften(float* products, int begin, int n, float scale, const Softmax& softmax,
                    int query) {
  const float earlier = softmax.highest[query];
  const Vec nothing = splat(-__builtin_inff());
  const int first = begin - begin % kLanes;
  Vec best = splat(earlier);
  for (int j = first; j < n; j += kLanes) {
    Vec scaled = load(products + j) * splat(scale);
    if (n - j < kLanes) scaled = first_lanes(scaled, n - j, nothing);
    if (j < begin) scaled = first_lanes(nothing, begin - j, scaled);
    best = max(best, scaled);
    store(products + j, scaled);
  }
  const float top = highest(best);
  Vec total = splat(0.0f);
  for (int j = first; j < n; j += kLanes) {
    const Vec weights = exponential(load(products + j) - splat(top));
    total = total + weights;
    store(products + j, weights);
  }
  float factor[kLanes];
  store(factor, exponential(splat(earlier - top)));
  softmax.highest[query] = top;
  softmax.total[query] = softmax.total[query] * factor[0] + sum(total);
  return factor[0];
}

/// sums = sums * factor + weights · values for kQueries queries and kVectors vectors of a head.
template <int kQueries, int kVectors>
void add_values(const TileBuffers& b, const float* weights, const float* factors, int begin, int n,
                int64_t column, float* sums) {
  Vec total[kQueries][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      total[i][c] = load(sums + i * b.width + column + c * kLanes) * splat(factors[i]);
    }
  }
  for (int j = begin; j < n; ++j) {
    const float* value = b.values + j * b.width + column;
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      const Vec weight = splat(weights[i * kKeyBlock + j]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        total[i][c] = fma(weight, load(value + c * kLanes), total[i][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      store(sums + i * b.width + column + c * kLanes, total[i][c]);
    }
  }
}

template <int kQueries>
void add_values(const TileBuffers& b, const float* weights, const float* factors, int begin, int n,
                float* sums) {
  constexpr int kStep = kVectorsAtOnce * kLanes;
  int64_t column = 0;
  for (; column + kStep <= b.width; column += kStep) {
    add_values<kQueries, kVectorsAtOnce>(b, weights, factors, begin, n, column, sums);
  }
  for (; column < b.width; column += kLanes) {
    add_values<kQueries, 1>(b, weights, factors, begin, n, column, sums);
  }
}

inline void add_values(const TileBuffers& b, int group, int begin, int n, float* sums) {
  int i = 0;
  const auto add = [&]<int kQueries>() {
    add_values<kQueries>(b, b.weights + i * kKeyBlock, b.factors + i, begin, n, sums + i * b.width);
  };
  for (; i + kQueriesAtOnce <= group; i += kQueriesAtOnce) {
    add.template operator()<kQueriesAtOnce>();
  }
  if (group - i == 1) add.template operator()<1>();
  if (group - i == 2) add.template operator()<2>();
  if (group - i == 3) add.template operator()<3>();
}

/// One row against keys [begin, n) of the block in the buffers. Asks for its share of the next
/// block.
template <typename T>
void attend_row(const AttentionTile& tile, const TileBuffers& b, const BlockRows<T>&, int row,
                int begin, int n, Ahead<T>& ahead) {
  const int first = row * tile.group;
  for (int i = 0; i < tile.group; ++i) {
    float* weights = b.weights + i * kKeyBlock;
    multiply_keys(b.q + (first + i) * b.width, b, begin, n, weights);
    b.factors[i] = soften(weights, begin, n, tile.scale, b.softmax, first + i);
    ahead.keep_up_with(tile, first + i);
  }
  add_values(b, tile.group, begin, n, b.sums + first * b.width);
}

/// By the functions above, or what overloads them for other buffers.
template <typename T, typename Buffers>
void attend(const AttentionTile& tile, const AttentionTile* next, std::byte* scratch) {
  const Buffers b(scratch, tile.rows, tile.group, tile.head_dim);
  start<T>(tile, b);
  BlockRows<T> blocks[2];  // in turn the block in hand and the one after it
  blocks[tile.first_block() / kKeyBlock % 2].find(tile, tile.first_block());
  for (int begin = tile.first_block(); begin < tile.last_limit(); begin += kKeyBlock) {
    const BlockRows<T>& rows = blocks[begin / kKeyBlock % 2];
    BlockRows<T>& following = blocks[1 - begin / kKeyBlock % 2];
    following.find_next(tile, begin, next);
    Ahead<T> ahead(following, tile.head_dim);
    load_block(rows, b, tile.head_dim, ahead);
    for (int row = 0; row < tile.rows; ++row) {
      const int limit = tile.first_limit + row - begin, first = tile.begin_of(row) - begin;
      const int n = limit < kKeyBlock ? limit : kKeyBlock;
      if (first < n) attend_row<T>(tile, b, rows, row, first > 0 ? first : 0, n, ahead);
    }
  }
  write_out<T>(tile, b.sums, b.width, b.softmax.total);
}

template <typename T>
constexpr AttentionLoops kAttentionLoops{&tile_rows, &attend_scratch<TileBuffers>,
                                         &attend<T, TileBuffers>};

}  // namespace
}  // namespace nanoflow::cpu
