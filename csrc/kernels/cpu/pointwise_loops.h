#pragma once

// The loops of pointwise.h; include one of math_<isa>.h first. Only for files that are compiled for
// one instruction set, hence the anonymous namespace.

#include "kernels/cpu/math_vec.h"
#include "kernels/cpu/pointwise.h"

namespace nanoflow::cpu {
namespace {

template <typename T>
float sum_of_squares(const T* x, int64_t count) {
  Vec even = splat(0.0f), odd = splat(0.0f);
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Vec a = load(x + i), b = load(x + i + kLanes);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for_vectors(count - i, [&](int64_t j, auto n) {
    const Vec a = load(x + i + j, n);
    even = fma(a, a, even);
  });
  return sum(even + odd);
}

template <typename T>
void rms_norm(const void* x_data, const void* weight_data, void* out_data, int64_t H,
              const NormStyle& style) {
  const T* x = static_cast<const T*>(x_data);
  const T* weight = static_cast<const T*>(weight_data);
  T* out = static_cast<T*>(out_data);
  const float mean = sum_of_squares(x, H) / static_cast<float>(H);
  const Vec inverse = splat(1.0f / __builtin_sqrtf(mean + style.eps));
  for_vectors(H, [=](int64_t i, auto n) {
    const Vec normal = load(x + i, n) * inverse, factor = load(weight + i, n);
    Vec y = style.unit_offset ? normal * (splat(1.0f) + factor) : rounded(normal, T{}) * factor;
    if (style.accumulate) y = y + load(out + i, n);
    store(out + i, y, n);
  });
}

template <typename T>
void scale(const void* x_data, float factor, void* out_data, int64_t H) {
  const T* x = static_cast<const T*>(x_data);
  T* out = static_cast<T*>(out_data);
  const Vec rounded_factor = rounded(splat(factor), T{});
  for_vectors(H, [=](int64_t i, auto n) { store(out + i, load(x + i, n) * rounded_factor, n); });
}

template <typename T>
void rotate(void* heads, int64_t count, const float* cos_sin, int64_t half) {
  for_vectors(half, [=](int64_t i, auto n) {
    const Vec cosine = load(cos_sin + i, n), sine = load(cos_sin + half + i, n);
    T* first = static_cast<T*>(heads) + i;
    for (int64_t head = 0; head < count; ++head, first += 2 * half) {
      T* second = first + half;
      const Vec a = load(first, n), b = load(second, n);
      store(first, a * cosine - b * sine, n);
      store(second, b * cosine + a * sine, n);
    }
  });
}

template <typename T>
void add_weighted(const void* x_data, int64_t x_stride, const int32_t* rows, const float* weights,
                  int64_t count, void* out_data, int64_t H, bool accumulate) {
  const T* x = static_cast<const T*>(x_data);
  T* out = static_cast<T*>(out_data);
  for_vectors(H, [=](int64_t i, auto n) {
    Vec sum = splat(0.0f);
    for (int64_t j = 0; j < count; ++j) {
      sum = fma(splat(weights[j]), load(x + rows[j] * x_stride + i, n), sum);
    }
    if (accumulate) sum = sum + load(out + i, n);
    store(out + i, sum, n);
  });
}

template <typename T>
constexpr PointwiseLoops kPointwiseLoops{&rms_norm<T>, &scale<T>, &rotate<T>, &add_weighted<T>};

}  // namespace
}  // namespace nanoflow::cpu
