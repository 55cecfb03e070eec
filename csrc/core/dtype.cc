#include "core/dtype.h"

#include <array>
#include <utility>

namespace nanoflow {
namespace {

struct Info {
  DType dtype;
  std::string_view name;
  size_t size;
};

constexpr std::array<Info, 5> kInfos{{
    {DType::kF32, "float32", 4},
    {DType::kBF16, "bfloat16", 2},
    {DType::kF16, "float16", 2},
    {DType::kI32, "int32", 4},
    {DType::kU64, "uint64", 8},
}};

const Info& info(DType dtype) { return kInfos[static_cast<size_t>(dtype)]; }

}  // namespace

size_t size_of(DType dtype) { return info(dtype).size; }

std::string_view to_string(DType dtype) { return info(dtype).name; }

DType parse_dtype(std::string_view name) {
  for (const Info& i : kInfos) {
    if (i.name == name) return i.dtype;
  }
  fail("unknown dtype '", name, "'; use float32, bfloat16, float16, int32 or uint64");
}

std::ostream& operator<<(std::ostream& out, DType dtype) { return out << to_string(dtype); }

}  // namespace nanoflow
