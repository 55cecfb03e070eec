#pragma once

// Attention on bfloat16 with the matrix tiles of AMX; include math_amx.h first. Only for files that
// are compiled for this instruction set, hence the anonymous namespace.
//
// Queries are taken 16 at a time. Their products with the keys are keys · queriesᵀ, as keys can be
// tiles as they lie in the cache; they are turned, made weights, rounded to bfloat16, and
// multiplied with values of which two keys lie side by side.

#include "kernels/cpu/attention_loops.h"
#include "kernels/cpu/attention_weights.h"

namespace nanoflow::cpu {
namespace {

constexpr int kStep = 2 * kTilePairs;  // bfloat16 in a row of a tile

using Rows = BlockRows<BFloat16>;
using AheadRows = Ahead<BFloat16>;

/// Buffers of a tile. Queries are padded to whole matrix tiles.
struct MatrixBuffers {
  int64_t D;
  int queries;        // rows * group
  BFloat16* q_rows;   // [16, D] queries of one matrix tile
  BFloat16* q;        // [queries / 16, D / 2, 16, 2]
  float* sums;        // [queries, D]
  BFloat16* keys;     // [kKeyBlock, D], for pages that do not hold whole matrix tiles
  BFloat16* values;   // [kKeyBlock / 2, D, 2]
  float* products;    // [kKeyBlock, 16]; then weights [kKeyBlock / 2, 16, 2] in bfloat16
  BFloat16* weights;  // [16, kKeyBlock]
  float* added;       // [16, D]
  float* factors;     // [16]
  Softmax softmax;    // [queries]; maxima in units of log2
  size_t bytes;

  MatrixBuffers(std::byte* scratch, int rows, int group, int head_dim) {
    ScratchPieces pieces(scratch);
    D = head_dim;
    queries = rows * group;
    const int64_t padded = (queries + kTileRows - 1) / kTileRows * kTileRows;
    q_rows = pieces.take<BFloat16>(kTileRows * D);
    q = pieces.take<BFloat16>(padded * D);
    sums = pieces.take<float>(padded * D);
    keys = pieces.take<BFloat16>(kKeyBlock * D);
    values = pieces.take<BFloat16>(kKeyBlock * D);
    products = pieces.take<float>(kKeyBlock * kTileRows);
    weights = pieces.take<BFloat16>(kTileRows * kKeyBlock);
    added = pieces.take<float>(kTileRows * D);
    factors = pieces.take<float>(kTileRows);
    softmax = {pieces.take<float>(padded), pieces.take<float>(padded)};
    bytes = pieces.bytes();
  }
};

inline void copy_head(const BFloat16* from, int64_t D, BFloat16* to) {
  for (int64_t d = 0; d < D; d += kStep) {
    _mm512_storeu_si512(to + d, _mm512_loadu_si512(from + d));
  }
}

/// Packs the queries as right-hand tiles: pairs of dimensions by queries.
inline void pack_queries(const AttentionTile& tile, const MatrixBuffers& b) {
  for (int first = 0; first < b.queries; first += kTileRows) {
    for (int i = 0; i < kTileRows; ++i) {
      const int query = first + i < b.queries ? first + i : first;  // the rest is not looked at
      const BFloat16* q = static_cast<const BFloat16*>(tile.q) +
                          query / tile.group * tile.q_stride + query % tile.group * b.D;
      copy_head(q, b.D, b.q_rows + i * b.D);
    }
    float* to = reinterpret_cast<float*>(b.q + first * b.D);
    for (int64_t pair = 0; pair < b.D / 2; pair += 4) {
      Vec turned[4];
      transpose_16x4(b.q_rows + 2 * pair, b.D * 2, turned);
      for (int i = 0; i < 4; ++i) store(to + (pair + i) * kTileRows, turned[i]);
    }
  }
}

/// Whether 16 keys at a time lie in one page.
inline bool holds_tiles(const AttentionTile& tile) { return tile.page_size % kTileRows == 0; }

/// From key to key of a matrix tile.
inline int64_t key_stride(const AttentionTile& tile) {
  return holds_tiles(tile) ? tile.k_token_stride : tile.head_dim;
}

/// Copies the keys of a block to where they make whole matrix tiles.
inline void copy_keys(const MatrixBuffers& b, Rows& rows) {
  for (int j = 0; j < rows.n; ++j) {
    copy_head(rows.k[j], b.D, b.keys + j * b.D);
    rows.k[j] = b.keys + j * b.D;
  }
}

/// Lays the values of keys [begin, n) side by side in pairs, all others as zeros. Tells whether
/// one from `doubtful` on is not finite.
inline bool pack_values(const Rows& rows, const MatrixBuffers& b, int begin, int n, int doubtful,
                        AheadRows& ahead) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 is_bad = 0;
  const int padded = (n + kStep - 1) / kStep * kStep;
  for (int j = 0; j < padded; j += 2) {
    BFloat16* to = b.values + j * b.D;
    ahead.fetch();
    for (int64_t d = 0; d < b.D; d += kStep) {
      const auto value = [&](int key) {
        return key >= begin && key < n ? _mm512_loadu_si512(rows.v[key] + d) : zero;
      };
      const __m512i even = value(j), odd = value(j + 1);
      store_pairs(even, odd, to + 2 * d);
      if (j + 1 >= doubtful) {
        is_bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(even, exponent), exponent);
        is_bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(odd, exponent), exponent);
      }
    }
  }
  return is_bad != 0;
}

/// products = keys · queriesᵀ for the keys [0, n) and on to a whole matrix tile.
inline void multiply_keys(const Rows& rows, int64_t key_stride, const MatrixBuffers& b,
                          const BFloat16* q, int n, AheadRows& ahead) {
  const int tiles = (n + kTileRows - 1) / kTileRows;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < b.D; d += kStep) {
    _tile_loadd(4, q + d * kTileRows, 64);
    ahead.fetch();
    _tile_loadd(5, rows.k[0] + d, key_stride * 2);
    _tile_dpbf16ps(0, 5, 4);
    if (tiles > 1) {
      ahead.fetch();
      _tile_loadd(6, rows.k[kTileRows] + d, key_stride * 2);
      _tile_dpbf16ps(1, 6, 4);
    }
    if (tiles > 2) {
      ahead.fetch();
      _tile_loadd(7, rows.k[2 * kTileRows] + d, key_stride * 2);
      _tile_dpbf16ps(2, 7, 4);
    }
    if (tiles > 3) {
      ahead.fetch();
      _tile_loadd(5, rows.k[3 * kTileRows] + d, key_stride * 2);
      _tile_dpbf16ps(3, 5, 4);
    }
  }
  constexpr int kTile = kTileRows * kTileFloats;
  _tile_stored(0, b.products, 64);
  if (tiles > 1) _tile_stored(1, b.products + kTile, 64);
  if (tiles > 2) _tile_stored(2, b.products + 2 * kTile, 64);
  if (tiles > 3) _tile_stored(3, b.products + 3 * kTile, 64);
}

/// added = weights · values of keys [0, n), for 64 dimensions from d on.
inline void multiply_values(const MatrixBuffers& b, int n, int64_t d, AheadRows& ahead) {
  const int64_t stride = 4 * b.D;  // bytes of a pair of keys
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int j = 0; j < n; j += kStep) {
    const BFloat16* values = b.values + j * b.D + 2 * d;
    _tile_loadd(4, b.weights + j, kKeyBlock * 2);
    ahead.fetch();
    _tile_loadd(5, values, stride);
    _tile_dpbf16ps(0, 4, 5);
    ahead.fetch();
    _tile_loadd(6, values + kStep, stride);
    _tile_dpbf16ps(1, 4, 6);
    if (d + kStep < b.D) {
      ahead.fetch();
      _tile_loadd(7, values + 2 * kStep, stride);
      _tile_dpbf16ps(2, 4, 7);
      ahead.fetch();
      _tile_loadd(5, values + 3 * kStep, stride);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, b.added + d, b.D * 4);
  _tile_stored(1, b.added + d + kTileFloats, b.D * 4);
  if (d + kStep < b.D) {
    _tile_stored(2, b.added + d + 2 * kTileFloats, b.D * 4);
    _tile_stored(3, b.added + d + 3 * kTileFloats, b.D * 4);
  }
}

inline void multiply_values(const MatrixBuffers& b, int n, AheadRows& ahead) {
  for (int64_t d = 0; d < b.D; d += 2 * kStep) multiply_values(b, n, d, ahead);
}

/// sums = sums * factor + added, of query i of the 16 from `first` on.
inline void merge(const MatrixBuffers& b, int first, int i) {
  float* sums = b.sums + (first + i) * b.D;
  const Vec factor = splat(b.factors[i]);
  for (int64_t d = 0; d < b.D; d += kLanes) {
    store(sums + d, fma(load(sums + d), factor, load(b.added + i * b.D + d)));
  }
}

/// What the 16 queries from `first` on see of the n keys from `begin` on.
inline Visible visible_of(const AttentionTile& tile, int first, int begin, int n) {
  Visible visible;
  for (int i = 0; i < kTileRows; ++i) {
    const int row = (first + i) / tile.group;
    const int from = tile.begin_of(row) - begin, limit = tile.first_limit + row - begin;
    visible.begin[i] = from > 0 ? from : 0;
    visible.end[i] = limit < n ? limit : n;
  }
  return visible;
}

/// The 16 queries from `first` on against the n keys of a block.
inline void attend_queries(const AttentionTile& tile, const MatrixBuffers& b, const Rows& rows,
                           int first, int begin, bool is_spoilt, AheadRows& ahead) {
  const int n = rows.n;
  const int count = b.queries - first < kTileRows ? b.queries - first : kTileRows;
  const Visible visible = visible_of(tile, first, begin, n);
  multiply_keys(rows, key_stride(tile), b, b.q + first * b.D, n, ahead);
  const TileWeights weights{b.products,
                            b.weights,
                            b.factors,
                            {b.softmax.highest + first, b.softmax.total + first},
                            splat(tile.scale * kLog2E)};
  weigh(weights, count, n, visible, [&ahead] { ahead.fetch(); });
  if (!is_spoilt) multiply_values(b, n, ahead);
  for (int i = 0; i < count; ++i) {
    const int from = visible.begin[i], end = visible.end[i];
    if (end <= from) continue;
    if (is_spoilt) {  // a weight of 0 does not silence what is not finite
      pack_values(rows, b, from, end, end, ahead);
      multiply_values(b, end, ahead);
    }
    merge(b, first, i);
  }
}

inline void attend_with_tiles(const AttentionTile& tile, const AttentionTile* next,
                              std::byte* scratch) {
  const MatrixBuffers b(scratch, tile.rows, tile.group, tile.head_dim);
  const FullTiles tiles;
  pack_queries(tile, b);
  for (int i = 0; i < b.queries; i += kLanes) {
    store(b.softmax.highest + i, splat(kLowest));
    store(b.softmax.total + i, splat(0.0f));
  }
  for (int64_t i = 0; i < b.queries * b.D; i += kLanes) store(b.sums + i, splat(0.0f));
  Rows blocks[2];  // in turn the block in hand and the one after it
  const int last_begin = tile.begin_of(tile.rows - 1);
  blocks[tile.first_block() / kKeyBlock % 2].find(tile, tile.first_block());
  for (int begin = tile.first_block(); begin < tile.last_limit(); begin += kKeyBlock) {
    Rows& rows = blocks[begin / kKeyBlock % 2];
    Rows& following = blocks[1 - begin / kKeyBlock % 2];
    following.find_next(tile, begin, next);
    AheadRows ahead(following, b.D);
    if (!holds_tiles(tile)) copy_keys(b, rows);
    const int doubtful = begin < last_begin ? 0 : tile.first_limit - begin;  // not seen by all rows
    const bool is_spoilt = pack_values(rows, b, 0, rows.n, doubtful, ahead);
    for (int first = 0; first < b.queries; first += kTileRows) {
      attend_queries(tile, b, rows, first, begin, is_spoilt, ahead);
    }
  }
  write_out<BFloat16>(tile, b.sums, b.D, b.softmax.total);
}

/// Heads that are no whole number of tiles go to the vectors.
inline bool takes_tiles(int head_dim) { return head_dim % kStep == 0; }

inline void attend_bf16(const AttentionTile& tile, const AttentionTile* next, std::byte* scratch) {
  if (takes_tiles(tile.head_dim)) {
    attend_with_tiles(tile, next, scratch);
  } else {
    attend<BFloat16, TileBuffers>(tile, next, scratch);
  }
}

inline size_t attend_bf16_scratch(int group, int head_dim) {
  return takes_tiles(head_dim) ? MatrixBuffers(nullptr, tile_rows(group), group, head_dim).bytes
                               : attend_scratch<TileBuffers>(group, head_dim);
}

constexpr AttentionLoops kTileAttentionLoops{&tile_rows, &attend_bf16_scratch, &attend_bf16};

}  // namespace
}  // namespace nanoflow::cpu
