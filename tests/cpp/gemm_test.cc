#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <string>

#include "core/error.h"
#include "matrix.h"

using namespace nanoflow;
using namespace nanoflow::testing;

TEST_CASE("gemm agrees with sums in double") {
  std::mt19937 random(1);
  for (const std::string& isa : cpu_isas()) {
    Runner runner(isa, 2);
    for (DType dtype : kDTypes) {
      for (int64_t T : {1, 3, 17, 33, 127}) {
        for (int64_t N : {1, 15, 16, 17, 100}) {
          for (int64_t K : {1, 2, 31, 32, 64, 100, 576}) {
            if (T * N * K > 2'000'000) continue;
            const bool is_float = (T + N + K) % 2 == 0;
            Matrix x(dtype, T, K, N % 2 ? 6 : 0), weight(dtype, N, K);
            Matrix out(is_float ? DType::kF32 : dtype, T, N, 10);
            x.fill(random);
            weight.fill(random);
            runner.run(x.tensor(), weight.tensor(), out.tensor());
            CAPTURE(isa);
            CAPTURE(dtype);
            CAPTURE(T);
            CAPTURE(N);
            CAPTURE(K);
            CHECK(worst_error(x, weight, out) <= 1.0);
            CHECK(out.is_gap_untouched());
          }
        }
      }
    }
  }
}

TEST_CASE("gemm is right where K, N or T takes several blocks") {
  std::mt19937 random(2);
  struct Shape {
    int64_t T, N, K;
  };
  for (const std::string& isa : cpu_isas()) {
    if (isa == "generic") continue;  // the same blocks as avx2, slower
    Runner runner(isa, 2);
    for (const Shape& shape : {Shape{33, 48, 1536}, Shape{5, 35, 14336 + 17}, Shape{700, 40, 960},
                               Shape{3, 3000, 64}, Shape{64, 576, 576}}) {
      for (DType dtype : {DType::kF32, DType::kBF16}) {
        Matrix x(dtype, shape.T, shape.K), weight(dtype, shape.N, shape.K);
        Matrix out(DType::kF32, shape.T, shape.N);
        x.fill(random);
        weight.fill(random);
        runner.run(x.tensor(), weight.tensor(), out.tensor());
        CAPTURE(isa);
        CAPTURE(dtype);
        CAPTURE(shape.K);
        CHECK(worst_error(x, weight, out) <= 1.0);
      }
    }
  }
}

TEST_CASE("a row of gemm is the same in any company, at any place and width") {
  std::mt19937 random(3);
  for (const std::string& isa : cpu_isas()) {
    for (DType dtype : kDTypes) {
      for (int64_t K : {33, 576, 1100}) {
        const int64_t T = 70, N = 83, I = 40;
        Matrix x(dtype, T, K), weight(dtype, N, K), whole(dtype, T, N), fused(dtype, T, I);
        x.fill(random);
        weight.fill(random);
        const Tensor gate_up = weight.tensor().slice_rows(0, 2 * I);
        Runner(isa, 2).run(x.tensor(), weight.tensor(), whole.tensor());
        Runner(isa, 2).run(GemmSiluMul{.x = x.tensor(), .weight = gate_up, .out = fused.tensor()});
        for (int width : {1, 2, 3}) {
          Runner runner(isa, width);
          for (int64_t piece : {1, 2, 3, 5, 7, 16, 17, 33, 70}) {
            int64_t different = 0;
            for (int64_t begin = 0; begin < T; begin += piece) {
              const int64_t rows = std::min(piece, T - begin);
              Matrix out(dtype, rows, N, 4), fused_out(dtype, rows, I, 4);
              const Tensor part = x.tensor().slice_rows(begin, begin + rows);
              runner.run(part, weight.tensor(), out.tensor());
              runner.run(GemmSiluMul{.x = part, .weight = gate_up, .out = fused_out.tensor()});
              for (int64_t row = 0; row < rows; ++row) {
                different += !rows_equal(out, row, whole, begin + row);
                different += !rows_equal(fused_out, row, fused, begin + row);
              }
            }
            CAPTURE(isa);
            CAPTURE(dtype);
            CAPTURE(K);
            CAPTURE(width);
            CAPTURE(piece);
            CHECK(different == 0);
          }
        }
      }
    }
  }
}

TEST_CASE("gemm rows do not change with slabs of activations") {
  std::mt19937 random(4);
  for (const std::string& isa : cpu_isas()) {
    if (isa == "generic") continue;
    const int64_t T = 600, N = 64, K = 2048;
    Matrix x(DType::kBF16, T, K), weight(DType::kBF16, N, K), whole(DType::kBF16, T, N);
    x.fill(random);
    weight.fill(random);
    Runner runner(isa, 2);
    runner.run(x.tensor(), weight.tensor(), whole.tensor());
    for (int64_t row : {0, 31, 32, 191, 192, 193, 383, 384, 599}) {
      Matrix out(DType::kBF16, 1, N);
      runner.run(x.tensor().slice_rows(row, row + 1), weight.tensor(), out.tensor());
      CAPTURE(isa);
      CAPTURE(row);
      CHECK(rows_equal(out, 0, whole, row));
    }
  }
}

TEST_CASE("gemm takes special values, and no rows at all") {
  for (const std::string& isa : cpu_isas()) {
    for (DType dtype : kDTypes) {
      Runner runner(isa, 2);
      std::mt19937 random(5);
      Matrix x(dtype, 2, 40), weight(dtype, 20, 40), out(dtype, 2, 20), none(dtype, 2, 20);
      x.fill(random);
      weight.fill(random);
      dispatch_float(dtype, "test", [&](auto tag) {
        using T = typename decltype(tag)::type;
        x.tensor().data<T>()[3] = static_cast<T>(std::numeric_limits<float>::infinity());
        x.tensor().data<T>()[40 + 39] = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
      });
      runner.run(x.tensor(), weight.tensor(), out.tensor());
      CAPTURE(isa);
      CAPTURE(dtype);
      for (int64_t n = 0; n < 20; ++n) {
        CHECK(std::isinf(out.at(0, n)));
        CHECK(std::isnan(out.at(1, n)));
      }
      runner.run(x.tensor().slice_rows(0, 0), weight.tensor(), none.tensor().slice_rows(0, 0));
      CHECK(std::isnan(none.at(0, 0)));  // as it was
    }
  }
}

TEST_CASE("gemm refuses what does not fit together") {
  Runner runner("auto", 1);
  const Matrix x(DType::kBF16, 4, 32), weight(DType::kBF16, 8, 32), out(DType::kBF16, 4, 8);
  const Matrix short_weight(DType::kBF16, 8, 31), float_weight(DType::kF32, 8, 32);
  const Matrix half_out(DType::kF16, 4, 8), narrow_out(DType::kBF16, 4, 7);
  CHECK_THROWS_WITH_AS(runner.run(x.tensor(), short_weight.tensor(), out.tensor()),
                       "gemm: weight is bfloat16[8, 31] but its dimension 1 (K) must be 32", Error);
  CHECK_THROWS_AS(runner.run(x.tensor(), float_weight.tensor(), out.tensor()), Error);
  CHECK_THROWS_WITH_AS(runner.run(x.tensor(), weight.tensor(), half_out.tensor()),
                       "gemm: out is float16[4, 8] but must be bfloat16 or float32", Error);
  CHECK_THROWS_AS(runner.run(x.tensor(), weight.tensor(), narrow_out.tensor()), Error);
  CHECK_THROWS_AS(
      runner.run(x.tensor().slice_columns(0, 0), weight.tensor().slice_columns(0, 0), out.tensor()),
      Error);
  const Gemm good{.x = x.tensor(), .weight = weight.tensor(), .out = out.tensor()};
  Gemm bad = good;
  bad.bias = weight.tensor().select(1, 0);
  CHECK_THROWS_WITH_AS(runner.run(bad), "gemm: bias must have stride 1 in its last dimension",
                       Error);
  bad = good;
  const Matrix float_out(DType::kF32, 4, 8);
  bad.out = float_out.tensor();
  bad.accumulate = true;
  CHECK_THROWS_WITH_AS(runner.run(bad),
                       "gemm: out is float32[4, 8] but must be bfloat16 where something is added",
                       Error);
  GemmSiluMul fused{.x = x.tensor(), .weight = weight.tensor(), .out = out.tensor()};
  CHECK_THROWS_WITH_AS(runner.run(fused),
                       "gemm_silu_mul: weight is bfloat16[8, 32] but needs twice the columns of "
                       "out, bfloat16[4, 8]",
                       Error);
  fused.out = out.tensor().slice_columns(0, 4);
  CHECK_THROWS_WITH_AS(
      runner.run(fused),
      "gemm_silu_mul: out is bfloat16[4, 4] but its columns must be a multiple of 8", Error);
  int32_t numbers[16] = {};
  const Tensor integers(numbers, DType::kI32, {}, {4, 4});
  CHECK_THROWS_WITH_AS(runner.run(integers, integers, integers),
                       "gemm does not support dtype int32; use float32, bfloat16 or float16",
                       Error);
}
