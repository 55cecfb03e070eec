#pragma once

#include "kernels/cpu/math_avx512_bf16.h"
// What is written against it:
#include "kernels/cpu/math_transpose512.h"

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

}  // namespace
}  // namespace nanoflow::cpu
