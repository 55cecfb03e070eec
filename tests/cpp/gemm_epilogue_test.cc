#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>

#include "matrix.h"

using namespace nanoflow;
using namespace nanoflow::testing;

TEST_CASE("gemm adds a bias and what out held, and rounds once") {
  std::mt19937 random(6);
  for (const std::string& isa : cpu_isas()) {
    Runner runner(isa, 2);
    for (DType dtype : kDTypes) {
      for (int64_t T : {1, 5, 33, 70}) {
        for (int64_t N : {3, 16, 40, 100}) {
          for (const auto& [has_bias, accumulate] :
               {std::pair{true, false}, {false, true}, {true, true}}) {
            const int64_t K = 96;
            Matrix x(dtype, T, K), weight(dtype, N, K), bias(dtype, 1, N), out(dtype, T, N, 10);
            Matrix before(dtype, T, N);
            for (Matrix* matrix : {&x, &weight, &bias, &before}) matrix->fill(random);
            if (accumulate) out.copy_from(before);
            runner.run(Gemm{.x = x.tensor(),
                            .weight = weight.tensor(),
                            .out = out.tensor(),
                            .bias = has_bias ? bias.tensor().select(0, 0) : Tensor(),
                            .accumulate = accumulate});
            double worst = 0;
            for (int64_t t = 0; t < T; ++t) {
              for (int64_t n = 0; n < N; ++n) {
                const Dot product = dot(x, t, weight, n);
                const double exact = product.sum + (has_bias ? bias.at(0, n) : 0) +
                                     (accumulate ? before.at(t, n) : 0);
                const double allowed = product.allowed() + 1e-6 + rounding_of(exact, dtype);
                const double error = std::abs(out.at(t, n) - exact);
                worst = std::isnan(error) ? 1e9 : std::max(worst, error / allowed);
              }
            }
            CAPTURE(isa);
            CAPTURE(dtype);
            CAPTURE(T);
            CAPTURE(N);
            CHECK(worst <= 1.0);
            CHECK(out.is_gap_untouched());
          }
        }
      }
    }
  }
}

TEST_CASE("gemm_silu_mul takes gate and up from their groups and rounds once") {
  std::mt19937 random(7);
  for (const std::string& isa : cpu_isas()) {
    Runner runner(isa, 2);
    for (DType dtype : kDTypes) {
      for (int64_t T : {1, 5, 33, 70}) {
        for (int64_t I : {8, 16, 24, 104}) {
          for (int64_t K : {1, 33, 96}) {
            Matrix x(dtype, T, K), weight(dtype, 2 * I, K), out(dtype, T, I, 10);
            x.fill(random);
            weight.fill(random);
            runner.run(
                GemmSiluMul{.x = x.tensor(), .weight = weight.tensor(), .out = out.tensor()});
            double worst = 0;
            for (int64_t t = 0; t < T; ++t) {
              for (int64_t i = 0; i < I; ++i) {
                const int64_t row = i / 8 * 16 + i % 8;
                const Dot gate = dot(x, t, weight, row), up = dot(x, t, weight, row + 8);
                const double silu = gate.sum / (1 + std::exp(-gate.sum));
                const double exact = silu * up.sum;
                // The slope of silu is below 1.1.
                const double allowed = 1.1 * gate.allowed() * std::abs(up.sum) +
                                       std::abs(silu) * up.allowed() + 1e-6 * std::abs(exact) +
                                       rounding_of(exact, dtype);
                const double error = std::abs(out.at(t, i) - exact);
                worst = std::isnan(error) ? 1e9 : std::max(worst, error / allowed);
              }
            }
            CAPTURE(isa);
            CAPTURE(dtype);
            CAPTURE(T);
            CAPTURE(I);
            CAPTURE(K);
            CHECK(worst <= 1.0);
            CHECK(out.is_gap_untouched());
          }
        }
      }
    }
  }
}
