#pragma once

#include "kernels/cpu/math_avx512_bf16.h"

// Matrix tiles of AMX beside the vectors of AVX-512. Only for files that are compiled for this
// instruction set, hence the anonymous namespace.

namespace nanoflow::cpu {
namespace {

constexpr int kTileRows = 16;    // of 64 bytes each
constexpr int kTileFloats = 16;  // in a row
constexpr int kTilePairs = 16;   // of bfloat16 in a row

/// Gives all eight tiles their full size while it lives.
class FullTiles {
 public:
  FullTiles() {
    Config config{};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = kTileRows;
    }
    _tile_loadconfig(&config);
  }
  ~FullTiles() { _tile_release(); }
  FullTiles(const FullTiles&) = delete;
  FullTiles& operator=(const FullTiles&) = delete;

 private:
  struct alignas(64) Config {  // as LDTILECFG wants it
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

/// 16 rows of 4 floats become 4 rows of 16: out[c][r] = in[r][c]. The stride is in floats.
inline void transpose_16x4(const float* in, int64_t stride, Vec (&out)[4]) {
  Vec rows[4];  // lane l of 128 bits of rows[i] is row 4 l + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto part = [&](int l) { return _mm_loadu_ps(in + (4 * l + i) * stride); };
    rows[i] = _mm512_castps128_ps512(part(0));
    rows[i] = _mm512_insertf32x4(rows[i], part(1), 1);
    rows[i] = _mm512_insertf32x4(rows[i], part(2), 2);
    rows[i] = _mm512_insertf32x4(rows[i], part(3), 3);
  }
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
  out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

}  // namespace
}  // namespace nanoflow::cpu
