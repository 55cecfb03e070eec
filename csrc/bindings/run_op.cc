#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "bindings/array.h"
#include "bindings/make_op.h"
#include "bindings/mirror.h"
#include "bindings/register.h"
#include "kernels/backend.h"

namespace py = pybind11;

namespace nanoflow {
namespace {

std::vector<Tensor> tensors_of(const py::kwargs& values) {
  std::vector<Tensor> tensors;
  for (const auto& [name, value] : values) {
    if (!py::isinstance<py::array>(value)) continue;
    tensors.push_back(as_tensor(py::reinterpret_borrow<py::array>(value)));
  }
  return tensors;
}

/// Where a kernel works: so many bytes in whole words, in memory that `owner` gets.
Tensor make_work(size_t bytes, Backend& backend, Buffer& owner) {
  const int64_t words = elements_for(DType::kI32, bytes);
  owner = backend.allocate(static_cast<size_t>(words) * size_of(DType::kI32));
  return Tensor(owner.data(), DType::kI32, backend.device(), {words});
}

/// Enqueues the op and, before an attention on a backend that wants one, its plan; returns the
/// memory they work in.
Buffer enqueue(Op& op, Backend& backend, Lane& lane) {
  Buffer work;
  if (auto* attention = std::get_if<Attention>(&op)) {
    const auto D = static_cast<int>(attention->k_cache.size(3));
    PlanAttention plan{.tables = attention->tables,
                       .segment_begin = attention->segment_begin,
                       .segment_end = attention->segment_end,
                       .num_heads = static_cast<int>(attention->q.size(1)) / D,
                       .num_kv_heads = static_cast<int>(attention->k_cache.size(1)),
                       .head_dim = D,
                       .window = attention->window,
                       .work = {},
                       .rows = attention->rows};
    const size_t bytes = backend.attention_work_bytes(static_cast<int>(plan.tables.kv_len.size(0)),
                                                      static_cast<int>(attention->q.size(0)),
                                                      plan.num_heads, plan.num_kv_heads);
    if (bytes > 0) {
      plan.work = attention->work = make_work(bytes, backend, work);
      backend.kernels().run(plan, lane);
    }
  }
  if (auto* gather = std::get_if<AllGather>(&op)) {
    const size_t bytes = backend.communicator().gather_work_bytes(
        static_cast<size_t>(gather->x.numel()) * size_of(gather->x.dtype()));
    if (bytes > 0) gather->work = make_work(bytes, backend, work);
  }
  std::visit([&](const auto& o) { backend.kernels().run(o, lane); }, op);
  return work;
}

/// An op over NumPy arrays, or over their copies on a GPU, and a lane to run it on.
struct Bench {
  Bench(const std::string& name, const std::shared_ptr<Backend>& backend, int width,
        const py::kwargs& values)
      : lane(backend->make_lane(width > 0 ? width : backend->width())),
        op(make_op(name, values, nullptr)) {
    if (backend->device().kind == Device::Kind::kCpu) return;
    mirror.emplace(*backend, *lane, tensors_of(values));
    op = make_op(name, values, &*mirror);
  }

  std::unique_ptr<Lane> lane;
  std::optional<Mirror> mirror;
  Op op;
};

void run_op(const std::string& name, const std::shared_ptr<Backend>& backend, int width,
            const py::kwargs& values) {
  const auto done = backend->make_event();
  Bench bench(name, backend, width, values);
  py::gil_scoped_release release;
  const Buffer work = enqueue(bench.op, *backend, *bench.lane);
  if (bench.mirror) bench.mirror->copy_back();
  bench.lane->record(*done);
  done->synchronize();
}

/// Runs the op over and over, at most two batches of runs ahead of the device, and returns the
/// microseconds of a run in the second half of the time.
double time_op(const std::string& name, const std::shared_ptr<Backend>& backend, double seconds,
               int width, const py::kwargs& values) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::duration<double> kBatch{0.02};
  Bench bench(name, backend, width, values);
  py::gil_scoped_release release;
  const Buffer work = enqueue(bench.op, *backend, *bench.lane);
  const std::unique_ptr<Event> done[] = {backend->make_event(), backend->make_event()};
  const auto enqueue_runs = [&](int runs, Event& event) {
    for (int i = 0; i < runs; ++i) {
      std::visit([&](const auto& op) { backend->kernels().run(op, *bench.lane); }, bench.op);
    }
    bench.lane->record(event);
  };
  enqueue_runs(1, *done[0]);
  done[0]->synchronize();
  auto begin = Clock::now();
  enqueue_runs(1, *done[0]);
  done[0]->synchronize();
  const int runs = std::max(1, static_cast<int>(kBatch / (Clock::now() - begin)));
  begin = Clock::now();
  const auto half = begin + std::chrono::duration_cast<Clock::duration>(
                                std::chrono::duration<double>(seconds / 2));
  enqueue_runs(runs, *done[0]);
  auto counted_from = begin;
  int64_t counted = 0;
  for (int batch = 1;; ++batch) {
    enqueue_runs(runs, *done[batch % 2]);
    done[(batch - 1) % 2]->synchronize();
    const auto now = Clock::now();
    if (now < half) {
      counted_from = now;
      continue;
    }
    counted += runs;
    if (now - begin >= std::chrono::duration<double>(seconds)) {
      done[batch % 2]->synchronize();
      return std::chrono::duration<double, std::micro>(now - counted_from).count() / counted;
    }
  }
}

}  // namespace

void register_run_op(py::module_& m) {
  m.def("run_op", &run_op, py::arg("name"), py::arg("backend"), py::arg("width") = 0,
        "Runs one op on NumPy arrays in place, on a lane of `width` threads or SMs (0: the "
        "backend's); a GPU works on copies of them. "
        "The keywords are the fields of the op's struct in kernels/ops.h, those of its tables "
        "among them; uint16 arrays are bfloat16. Raises TypeError for missing or unknown "
        "operands, EngineError for what the op refuses.");
  m.def("time_op", &time_op, py::arg("name"), py::arg("backend"), py::arg("seconds"),
        py::arg("width") = 0,
        "Microseconds of a run of an op that is repeated for so many seconds, the first half of "
        "them dropped: what it takes under sustained load. Operands and errors as run_op; the "
        "arrays are overwritten on the CPU and left alone by a GPU.");
}

}  // namespace nanoflow
