#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"

// Matrices, products in double and a runner, for the tests of GEMMs.

namespace nanoflow::testing {

inline constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

/// A matrix in the middle of a wider one, whose other elements are NaN before and must be after.
class Matrix {
 public:
  Matrix(DType dtype, int64_t rows, int64_t columns, int64_t gap = 0)
      : bytes_(static_cast<size_t>(rows * (columns + gap)) * size_of(dtype), std::byte{0xff}) {
    whole_ = Tensor(bytes_.data(), dtype, {}, {rows, columns + gap});
    tensor_ = whole_.slice_columns(gap / 2, gap / 2 + columns);
  }

  const Tensor& tensor() const { return tensor_; }

  double at(int64_t row, int64_t column) const { return read(tensor_, row, column); }

  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t row = 0; row < tensor_.size(0); ++row) {
      for (int64_t column = 0; column < tensor_.size(1); ++column) {
        write(row, column, normal(random));
      }
    }
  }

  void copy_from(const Matrix& other) {
    for (int64_t row = 0; row < tensor_.size(0); ++row) {
      for (int64_t column = 0; column < tensor_.size(1); ++column) {
        write(row, column, static_cast<float>(other.at(row, column)));
      }
    }
  }

  bool is_gap_untouched() const {
    const int64_t first = (whole_.size(1) - tensor_.size(1)) / 2, last = first + tensor_.size(1);
    for (int64_t row = 0; row < whole_.size(0); ++row) {
      for (int64_t column = 0; column < whole_.size(1); ++column) {
        const bool is_gap = column < first || column >= last;
        if (is_gap && !std::isnan(read(whole_, row, column))) return false;
      }
    }
    return true;
  }

  const std::byte* row(int64_t row) const {
    return tensor_.bytes() + row * tensor_.stride(0) * static_cast<int64_t>(item());
  }
  size_t item() const { return size_of(tensor_.dtype()); }

 private:
  static double read(const Tensor& tensor, int64_t row, int64_t column) {
    return dispatch_float(tensor.dtype(), "test", [&](auto tag) {
      using T = typename decltype(tag)::type;
      return static_cast<double>(
          static_cast<float>(tensor.data<T>()[row * tensor.stride(0) + column]));
    });
  }

  void write(int64_t row, int64_t column, float value) {
    dispatch_float(tensor_.dtype(), "test", [&](auto tag) {
      using T = typename decltype(tag)::type;
      tensor_.data<T>()[row * tensor_.stride(0) + column] = static_cast<T>(value);
    });
  }

  std::vector<std::byte> bytes_;
  Tensor whole_, tensor_;
};

/// What rounding `value` to a dtype may cost: half a unit in the last place.
inline double rounding_of(double value, DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return std::abs(value) * 0x1p-8;
    case DType::kF16:
      return std::max(std::abs(value) * 0x1p-11, 0x1p-25);  // the latter below the normal numbers
    default:
      return std::abs(value) * 0x1p-24;
  }
}

struct Runner {
  std::shared_ptr<Backend> backend;
  std::unique_ptr<Lane> lane;

  Runner(const std::string& isa, int width)
      : backend(make_backend({.device = {}, .threads = width, .isa = isa})),
        lane(backend->make_lane(width)) {}

  void run(const Tensor& x, const Tensor& weight, const Tensor& out) {
    run(Gemm{.x = x, .weight = weight, .out = out});
  }
  void run(const auto& op) {
    backend->kernels().run(op, *lane);
    const auto done = backend->make_event();
    lane->record(*done);
    done->synchronize();
  }
};

/// A dot product and the sum of its terms' magnitudes.
struct Dot {
  double sum = 0, magnitude = 0;

  /// Float sums of the products in any order; 1e-6 of the magnitudes covers their rounding.
  double allowed() const { return 1e-6 * magnitude + 1e-30; }
};

inline Dot dot(const Matrix& x, int64_t t, const Matrix& weight, int64_t n) {
  Dot dot;
  for (int64_t k = 0; k < x.tensor().size(1); ++k) {
    const double product = x.at(t, k) * weight.at(n, k);
    dot.sum += product;
    dot.magnitude += std::abs(product);
  }
  return dot;
}

/// The worst error of out, in units of what rounding explains.
inline double worst_error(const Matrix& x, const Matrix& weight, const Matrix& out) {
  double worst = 0;
  for (int64_t t = 0; t < x.tensor().size(0); ++t) {
    for (int64_t n = 0; n < weight.tensor().size(0); ++n) {
      const Dot exact = dot(x, t, weight, n);
      const double allowed = exact.allowed() + rounding_of(exact.sum, out.tensor().dtype());
      const double error = std::abs(out.at(t, n) - exact.sum);
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity()
                                : std::max(worst, error / allowed);
    }
  }
  return worst;
}

inline bool rows_equal(const Matrix& a, int64_t row_a, const Matrix& b, int64_t row_b) {
  const size_t bytes = static_cast<size_t>(a.tensor().size(1)) * a.item();
  return std::memcmp(a.row(row_a), b.row(row_b), bytes) == 0;
}

}  // namespace nanoflow::testing
