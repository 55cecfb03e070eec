#include <doctest/doctest.h>

#include <string_view>
#include <utility>

#include "kernels/cuda/gemm.h"
#include "kernels/product_time.h"

namespace nanoflow::cuda {
namespace {

constexpr int kSms = 132;

GemmKernel choose(const GemmShape& shape, int sms = kSms) {
  return choose_gemm(shape, sms, {.x = DType::kBF16, .out = DType::kBF16});
}

TEST_CASE("the choice is the kernel with the least expected time") {
  for (int rows : {1, 64, 129, 640, 1024, 2048}) {
    for (int sms : {8, 84, 108, kSms}) {
      const GemmShape shape{.rows = rows, .features = 6144, .depth = 4096};
      const double least = gemm_time_us(choose(shape, sms), shape, sms);
      for (int i = 0; i < kNumGemmKernels; ++i) {
        const auto kernel = static_cast<GemmKernel>(i);
        const GemmTraits& traits = traits_of(kernel);
        if (rows <= 64 && traits.tile_rows > 64) continue;  // not for so few rows
        if (rows == 2048 && traits.is_stream_k) continue;   // nor for so many waves
        const int tiles = traits.k_parts * ((rows + 127) / 128) * (shape.features / 128);
        if (traits.k_parts > 1 && tiles > sms) continue;  // parts of K: for SMs that would be idle
        if (sms < kSms && traits.name.ends_with("columns")) continue;
        CHECK(least <= gemm_time_us(kernel, shape, sms));
      }
    }
  }
}

TEST_CASE("expected times fall with SMs and grow with every dimension") {
  for (int i = 0; i < kNumGemmKernels; ++i) {
    const auto kernel = static_cast<GemmKernel>(i);
    const GemmShape shape{.rows = 512, .features = 4096, .depth = 4096};
    const double us = gemm_time_us(kernel, shape, 96);
    CAPTURE(traits_of(kernel).name);
    CHECK(gemm_time_us(kernel, shape, kSms) <= us);
    CHECK(gemm_time_us(kernel, {.rows = 1024, .features = 4096, .depth = 4096}, 96) > us);
    CHECK(gemm_time_us(kernel, {.rows = 512, .features = 8192, .depth = 4096}, 96) > us);
    CHECK(gemm_time_us(kernel, {.rows = 512, .features = 4096, .depth = 8192}, 96) > us);
  }
}

TEST_CASE("tiles fit the rows and the SMs") {
  // 8 × 16 tiles of 128 × 256 are one wave on 132 SMs and would be two on 108.
  const GemmShape shape{.rows = 1024, .features = 4096, .depth = 14336};
  CHECK(choose(shape) == GemmKernel::k128x256);
  CHECK(choose(shape, 108) != GemmKernel::k128x256);
  // 4 × 32 tiles of 128 × 192 are one wave.
  CHECK(choose({.rows = 512, .features = 6144, .depth = 4096}) == GemmKernel::k128x192);
  // Tiles of 128 x 256 take the least energy, but leave SMs idle in the last of few waves.
  CHECK(choose({.rows = 1024, .features = 28672, .depth = 4096}) == GemmKernel::k128x256);
  CHECK(choose({.rows = 512, .features = 28672, .depth = 4096}) == GemmKernel::k128x128);
  // 2 × 64 tiles of 128 × 96 are one wave.
  CHECK(choose({.rows = 256, .features = 6144, .depth = 4096}) == GemmKernel::k128x96Pair);
  // Two halves of K each of 2 × 32 tiles of 128 × 128 are one wave, too.
  CHECK(choose({.rows = 256, .features = 4096, .depth = 4096}) == GemmKernel::k128x128Halves);
  CHECK(choose({.rows = 256, .features = 4096, .depth = 14336}) == GemmKernel::k128x128Halves);
  // 8 × 26 tiles of 128 × 160 are two waves on 104 SMs.
  CHECK(choose(shape, 104) == GemmKernel::k128x160);
  // Five tiles of rows have no sixth beside them: 5 x 26 tiles of 128 x 160.
  CHECK(choose({.rows = 640, .features = 4096, .depth = 14336}) == GemmKernel::k128x160Columns);
  // 4 x 29 tiles of 128 x 144 are one wave on 116 SMs.
  CHECK(choose({.rows = 512, .features = 4096, .depth = 14336}, 116) == GemmKernel::k128x144);
  // Many rows: tiles that read the least, whatever the waves.
  CHECK(choose({.rows = 2048, .features = 28672, .depth = 4096}) == GemmKernel::k128x256);
  // Few rows are bound by the weights: no tile of 128 rows.
  CHECK(traits_of(choose({.rows = 16, .features = 4096, .depth = 4096})).tile_rows == 16);
}

TEST_CASE("pairs of columns are for products that have all SMs") {
  for (int rows : {128, 384, 576, 640, 896, 1280}) {
    for (int sms : {84, 92, 108, 116, 124}) {
      for (const auto& [features, depth] : {std::pair{4096, 14336}, {4096, 4096}, {6144, 4096}}) {
        const GemmShape shape{.rows = rows, .features = features, .depth = depth};
        CHECK(traits_of(choose(shape, sms)).name.find("columns") == std::string_view::npos);
      }
    }
  }
  CHECK(choose({.rows = 640, .features = 6144, .depth = 4096}) == GemmKernel::k128x256Columns);
}

TEST_CASE("time grows by whole waves") {
  const auto us = [](int rows, int sms) {
    return cuda_gemm_us(rows, 28672, 4096, sms, /*is_general=*/true);
  };
  // Gate and up: 5 x 112 tiles of 128 x 256 are 6 waves on 96 SMs; on 92, 5 x 224 tiles of
  // 128 x 128 are 13 and 6 x 224 are 15.
  CHECK(us(640, 96) < 0.93 * us(640, 92));
  CHECK(us(704, 92) == doctest::Approx(15.0 / 13 * us(640, 92)).epsilon(0.01));
  CHECK(us(704, 92) == us(768, 92));
}

TEST_CASE("the kernel for any number of rows exists for all types and adds along K in one order") {
  CHECK(traits_of(kInvariantGemm).is_general);
  CHECK(!traits_of(kInvariantGemm).is_stream_k);
}

TEST_CASE("only general kernels are chosen for other types than bfloat16 into bfloat16") {
  const GemmType types[] = {{.x = DType::kBF16, .out = DType::kF32},
                            {.x = DType::kF16, .out = DType::kF16},
                            {.x = DType::kBF16, .out = DType::kBF16, .is_silu_mul = true}};
  for (const GemmType& type : types) {
    for (int rows : {1, 64, 256, 640, 1024}) {
      const GemmShape shape{.rows = rows, .features = 128256, .depth = 4096};
      CHECK(traits_of(choose_gemm(shape, kSms, type)).is_general);
    }
  }
}

}  // namespace
}  // namespace nanoflow::cuda
