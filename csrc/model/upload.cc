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

/// Calls fn(target row, source row, rows) for the parts of the runs that source rows [begin, end)
/// fill.
template <typename Fn>
void for_parts(const std::vector<RowRun>& runs, int64_t begin, int64_t end, const Fn& fn) {
  int64_t first = 0;  // source row of the run
  for (const RowRun& run : runs) {
    const int64_t low = std::max(begin, first), high = std::min(end, first + run.count);
    if (low < high) fn(run.row + low - first, low, high - low);
    first += run.count;
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

void Uploader::write(const Tensor& target, const std::vector<RowRun>& runs, const void* from,
                     DType dtype) {
  const DType to_dtype = target.dtype();
  const auto values = static_cast<size_t>(target.stride(0));  // of a row
  const size_t from_bytes = values * size_of(dtype), to_bytes = values * size_of(to_dtype);
  const auto* source = static_cast<const std::byte*>(from);
  int64_t rows = 0;
  for (const RowRun& run : runs) rows += run.count;

  if (target.device().kind == Device::Kind::kCpu) {  // no way to go
    parallel_shares(rows, static_cast<size_t>(rows) * to_bytes, [&](int64_t begin, int64_t end) {
      for_parts(runs, begin, end, [&](int64_t to, int64_t first, int64_t count) {
        convert(source + static_cast<size_t>(first) * from_bytes, dtype,
                target.bytes() + static_cast<size_t>(to) * to_bytes, to_dtype,
                static_cast<size_t>(count) * values);
      });
    });
    return;
  }
  const auto step = static_cast<int64_t>(std::max<size_t>(1, kBufferBytes / to_bytes));
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t end = std::min(rows, begin + step);
    const size_t bytes = static_cast<size_t>(end - begin) * to_bytes;
    Stage& stage = free_stage(bytes);
    std::byte* staged = stage.buffer.data();
    parallel_shares(end - begin, bytes, [&](int64_t low, int64_t high) {
      convert(source + static_cast<size_t>(begin + low) * from_bytes, dtype,
              staged + static_cast<size_t>(low) * to_bytes, to_dtype,
              static_cast<size_t>(high - low) * values);
    });
    for_parts(runs, begin, end, [&](int64_t to, int64_t first, int64_t count) {
      backend_.copy(target.bytes() + static_cast<size_t>(to) * to_bytes,
                    staged + static_cast<size_t>(first - begin) * to_bytes,
                    static_cast<size_t>(count) * to_bytes, *lane_);
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
