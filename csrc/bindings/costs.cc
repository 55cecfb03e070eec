#include <limits>

#include "bindings/register.h"
#include "kernels/product_time.h"
#include "pipeline/buckets.h"

namespace py = pybind11;

namespace nanoflow {
namespace {

int padded_rows(int rows, int granularity) {
  return bucket_of(rows, granularity, std::numeric_limits<int>::max());
}

}  // namespace

void register_costs(py::module_& m) {
  m.def("cuda_gemm_us", &cuda_gemm_us, py::arg("rows"), py::arg("features"), py::arg("depth"),
        py::arg("sms"), py::arg("is_general") = false,
        "Microseconds of x [rows, depth] by weightᵀ [features, depth] on so many SMs, at a clock "
        "that power does not lower, by the model that kernels are chosen by: good for comparing "
        "sizes and widths. `is_general`: other than bfloat16 into bfloat16, or with an activation. "
        "Needs no GPU.");
  m.def("padded_rows", &padded_rows, py::arg("rows"), py::arg("granularity"),
        "Rows of the bucket that a step of so many is padded to, on a backend of this "
        "granularity.");
}

}  // namespace nanoflow
