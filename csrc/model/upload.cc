#include "model/upload.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <thread>

namespace nanoflow {
namespace {

constexpr size_t kMaxThreads = 8;
constexpr size_t kThreadBytes = size_t{1} << 20;  // a thread should be worth its start

/// Calls fn(begin, end) for shares of [0, count), on threads where there are `bytes` enough.
template <typename Fn>
void parallel_shares(int64_t count, size_t bytes, const Fn& fn) {
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  const auto threads = static_cast<int64_t>(
      std::clamp<size_t>(bytes / kThreadBytes, 1, std::min(kMaxThreads, cores)));
  std::vector<std::jthread> helpers;
  for (int64_t t = 1; t < threads; ++t) {
    helpers.emplace_back(fn, count * t / threads, count * (t + 1) / threads);
  }
  fn(0, count / threads);
}

void convert(const std::byte* from, DType from_dtype, std::byte* to, DType to_dtype, size_t count) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, count * size_of(to_dtype));
    return;
  }
  dispatch_float(to_dtype, "weights", [&](auto tag) {
    using To = typename decltype(tag)::type;
    dispatch_float(from_dtype, "weights", [&](auto from_tag) {
      using From = typename decltype(from_tag)::type;
      const From* source = reinterpret_cast<const From*>(from);
      To* target = reinterpret_cast<To*>(to);
      for (size_t i = 0; i < count; ++i) target[i] = static_cast<To>(static_cast<float>(source[i]));
    });
  });
}

/// Calls fn(run, index of its first row among the rows of all runs) for the parts of the runs that
/// rows [begin, end) of all are in.
template <typename Fn>
void for_parts(const std::vector<RowRun>& runs, int64_t begin, int64_t end, const Fn& fn) {
  int64_t first = 0;
  for (const RowRun& run : runs) {
    const int64_t low = std::max(begin, first), high = std::min(end, first + run.count);
    const int64_t skipped = low - first;
    if (low < high) fn(RowRun{run.from + skipped, run.row + skipped, high - low}, low);
    first += run.count;
  }
}

/// `count` rows from row `from` on, `values` of each.
void convert_rows(const SourceRows& source, int64_t from, int64_t count, size_t values,
                  std::byte* to, DType to_dtype) {
  const size_t from_bytes = static_cast<size_t>(source.stride) * size_of(source.dtype);
  const auto* data =
      static_cast<const std::byte*>(source.data) + static_cast<size_t>(from) * from_bytes;
  if (values == static_cast<size_t>(source.stride)) {  // one piece
    convert(data, source.dtype, to, to_dtype, static_cast<size_t>(count) * values);
    return;
  }
  for (int64_t row = 0; row < count; ++row) {
    convert(data, source.dtype, to, to_dtype, values);
    data += from_bytes;
    to += values * size_of(to_dtype);
  }
}

}  // namespace

Uploader::Uploader(Backend& backend)
    : backend_(backend), lane_(backend.make_lane(backend.width())) {}

Uploader::~Uploader() {
  try {
    finish();
  } catch (const std::exception&) {
    // Whoever needs the data calls finish().
  }
}

void Uploader::write(const Tensor& target, const std::vector<RowRun>& runs,
                     const SourceRows& source) {
  const DType dtype = target.dtype();
  const auto values = static_cast<size_t>(target.stride(0));  // of a row
  const size_t row_bytes = values * size_of(dtype);
  const auto target_row = [&](int64_t row) {
    return target.bytes() + static_cast<size_t>(row) * row_bytes;
  };
  int64_t rows = 0;
  for (const RowRun& run : runs) rows += run.count;

  if (target.device().kind == Device::Kind::kCpu) {  // no way to go
    parallel_shares(rows, static_cast<size_t>(rows) * row_bytes, [&](int64_t begin, int64_t end) {
      for_parts(runs, begin, end, [&](const RowRun& run, int64_t) {
        convert_rows(source, run.from, run.count, values, target_row(run.row), dtype);
      });
    });
    return;
  }
  const auto step = static_cast<int64_t>(std::max<size_t>(1, kBufferBytes / row_bytes));
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t end = std::min(rows, begin + step);
    const size_t bytes = static_cast<size_t>(end - begin) * row_bytes;
    Stage& stage = free_stage(bytes);
    const auto staged_row = [&](int64_t index) {
      return stage.buffer.data() + static_cast<size_t>(index - begin) * row_bytes;
    };
    parallel_shares(end - begin, bytes, [&](int64_t low, int64_t high) {
      for_parts(runs, begin + low, begin + high, [&](const RowRun& run, int64_t index) {
        convert_rows(source, run.from, run.count, values, staged_row(index), dtype);
      });
    });
    for_parts(runs, begin, end, [&](const RowRun& run, int64_t index) {
      backend_.copy(target_row(run.row), staged_row(index),
                    static_cast<size_t>(run.count) * row_bytes, *lane_);
    });
    lane_->record(*stage.copied);
  }
}

Uploader::Stage& Uploader::free_stage(size_t bytes) {
  Stage& stage = stages_[next_];
  next_ = (next_ + 1) % stages_.size();
  if (stage.copied == nullptr) stage.copied = backend_.make_event();
  stage.copied->synchronize();
  if (stage.buffer.bytes() < bytes) {
    stage.buffer = backend_.allocate_host(std::max(bytes, kBufferBytes));
  }
  return stage;
}

void Uploader::finish() {
  const auto done = backend_.make_event();
  lane_->record(*done);
  done->synchronize();
}

}  // namespace nanoflow
