#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>

#include "core/arena.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/match.h"
#include "core/tensor.h"

using namespace nanoflow;

namespace {

std::string print(const auto& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

}  // namespace

TEST_CASE("a bfloat16 rounds to nearest even and keeps NaN") {
  CHECK(static_cast<float>(BFloat16(1.0f)) == 1.0f);
  CHECK(static_cast<float>(BFloat16(1.00390625f)) == 1.0f);       // halfway, even below
  CHECK(static_cast<float>(BFloat16(1.01171875f)) == 1.015625f);  // halfway, even above
  CHECK(std::isnan(static_cast<float>(BFloat16(std::numeric_limits<float>::quiet_NaN()))));
  CHECK(std::isinf(static_cast<float>(BFloat16(3.4e38f))));
}

TEST_CASE("dtypes have names and sizes") {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kI32, DType::kU64}) {
    CHECK(parse_dtype(to_string(dtype)) == dtype);
  }
  CHECK(size_of(DType::kBF16) == 2);
  CHECK(size_of(DType::kU64) == 8);
  CHECK(elements_for(DType::kI32, 460) == 115);
  CHECK(elements_for(DType::kI32, 462) == 116);
  CHECK_THROWS_WITH_AS(parse_dtype("int4"),
                       "unknown dtype 'int4'; use float32, bfloat16, float16, int32 or uint64",
                       Error);
  CHECK_THROWS_WITH_AS(dispatch_float(DType::kI32, "gemm", [](auto) {}),
                       "gemm does not support dtype int32; use float32, bfloat16 or float16",
                       Error);
}

TEST_CASE("devices parse and print") {
  CHECK(parse_device("cpu") == Device{});
  CHECK(parse_device("cuda:3") == Device{.kind = Device::Kind::kCuda, .index = 3});
  CHECK(print(parse_device("cuda")) == "cuda:0");
  CHECK_THROWS_AS(parse_device("cuda:x"), Error);
  CHECK_THROWS_AS(parse_device("tpu"), Error);
}

TEST_CASE("tensor views share memory and know their span") {
  float data[24];
  const Tensor tensor(data, DType::kF32, {}, {4, 6});
  const Tensor rows = tensor.slice_rows(1, 3);
  CHECK(rows.data<float>() == data + 6);
  CHECK(rows.size(0) == 2);
  CHECK(rows.is_contiguous());
  const Tensor columns = tensor.slice_columns(2, 4);
  CHECK(columns.data<float>() == data + 2);
  CHECK(columns.stride(0) == 6);
  CHECK_FALSE(columns.is_contiguous());
  CHECK(columns.span_bytes() == (3 * 6 + 2) * sizeof(float));
  CHECK(tensor.slice_rows(2, 2).span_bytes() == 0);
  CHECK_THROWS_WITH_AS(tensor.slice_rows(3, 5), "rows [3, 5) are outside float32[4, 6]", Error);
  CHECK_THROWS_AS(tensor.slice_columns(5, 7), Error);

  const Tensor cube(data, DType::kF32, {}, {2, 3, 4});
  const Tensor middle = cube.select(1, 2);
  CHECK(print(middle) == "float32[2, 4]");
  CHECK(middle.data<float>() == data + 8);
  CHECK(middle.stride(0) == 12);
  CHECK_THROWS_AS(cube.select(1, 3), Error);
}

TEST_CASE("shapes are matched by name") {
  float data[24];
  const Tensor x(data, DType::kF32, {}, {4, 6}), weight(data, DType::kF32, {}, {5});
  ShapeMatcher match("rms_norm");
  match("x", x, {"T", "H"}).dtype(DType::kF32).contiguous_rows();
  CHECK(match["H"] == 6);
  CHECK_THROWS_WITH_AS(match("weight", weight, {"H"}),
                       "rms_norm: weight is float32[5] but its dimension 0 (H) must be 6", Error);
  CHECK_THROWS_WITH_AS(match("x", x, {"T"}), "rms_norm: x is float32[4, 6] but needs 1 dimensions",
                       Error);
  CHECK_THROWS_WITH_AS(match("x", x, {"T", "H"}).dtype(DType::kF16),
                       "rms_norm: x is float32[4, 6] but must be float16", Error);
}

TEST_CASE("an arena carves one buffer into aligned tensors") {
  Arena arena;
  const int first = arena.add("first", DType::kBF16, {3, 5});
  arena.add("second", DType::kF32, {2, 3, 4, 5});
  CHECK_THROWS_AS(arena.add("first", DType::kF32, {1}), Error);
  CHECK_THROWS_AS(arena.tensor(first), Error);  // not bound yet
  std::vector<std::byte> memory(arena.bytes());
  int released = 0;
  {
    arena.bind(Buffer(memory.data(), memory.size(), {}, [&](void*) { ++released; }));
    const Tensor a = arena.tensor("first"), b = arena.tensor("second");
    CHECK(a.bytes() == memory.data());
    CHECK(b.bytes() - a.bytes() == static_cast<std::ptrdiff_t>(Arena::kAlignment));
    CHECK(print(b) == "float32[2, 3, 4, 5]");
    CHECK_THROWS_AS(arena.tensor("third"), Error);
    const Arena moved = std::move(arena);
    CHECK(released == 0);
  }
  CHECK(released == 1);
  Arena small;
  small.add("x", DType::kF32, {100});
  CHECK_THROWS_AS(small.bind(Buffer(memory.data(), 8, {}, [](void*) {})), Error);
}
