#pragma once

#include <cstdint>

namespace nanoflow {
class Lane;
struct RmsNorm;
}  // namespace nanoflow

namespace nanoflow::cpu {

/// How a norm ends: see RmsNorm.
struct NormStyle {
  float eps;
  bool unit_offset, accumulate;
};

/// Loops over one row; pointers are to elements of the dtype they were compiled for.
struct PointwiseLoops {
  /// RmsNorm; out may be x.
  void (*rms_norm)(const void* x, const void* weight, void* out, int64_t H, const NormStyle& style);
  /// out = x * round(factor)
  void (*scale)(const void* x, float factor, void* out, int64_t H);
  /// Rotates heads of 2 * half elements by half cosines, then half sines.
  void (*rotate)(void* heads, int64_t count, const float* cos_sin, int64_t half);
  /// out = weights[0] * x[rows[0]] + ... over `count` of the rows of x, which are x_stride
  /// elements apart, or out += the same.
  void (*add_weighted)(const void* x, int64_t x_stride, const int32_t* rows, const float* weights,
                       int64_t count, void* out, int64_t H, bool accumulate);
};

void norm_row(const RmsNorm& op, const PointwiseLoops& loops, int64_t row);
/// Queues all rows, which the lane's threads share.
void norm_rows(const RmsNorm& op, const PointwiseLoops& loops, Lane& lane);

}  // namespace nanoflow::cpu
