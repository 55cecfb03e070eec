#include <doctest/doctest.h>

#include <atomic>
#include <future>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "core/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/green.h"
#include "kernels/cuda/lane.h"

using namespace nanoflow;

namespace {

constexpr int kMaxSms = 256;

std::shared_ptr<Backend> gpu() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    MESSAGE("no GPU: not tested");
    return nullptr;
  }
  return make_backend({.device = parse_device("cuda")});
}

cudaStream_t stream_of(Lane& lane) { return cuda::cuda_lane(lane).stream(); }

void drain(Backend& backend, Lane& lane) {
  const auto event = backend.make_event();
  lane.record(*event);
  event->synchronize();
}

/// Marks the SM that it runs on, long enough for its grid to spread.
__global__ void mark_sm(int* marks) {
  unsigned sm;
  asm volatile("mov.u32 %0, %smid;" : "=r"(sm));
  if (threadIdx.x == 0) atomicAdd(&marks[sm], 1);
  __nanosleep(20000);
}

/// Adds one if the value is what it should be.
__global__ void expect_and_add(int* value, int expected) {
  if (*value == expected) *value += 1;
}

__global__ void add(int* value, int term) { *value += term; }
__global__ void twice(int* value) { *value *= 2; }

__global__ void write_nowhere() { *reinterpret_cast<volatile int*>(8) = 1; }

struct Marks {
  Buffer buffer;

  explicit Marks(Backend& backend) : buffer(backend.allocate(kMaxSms * sizeof(int))) { clear(); }
  void clear() const {
    NF_CUDA_CHECK(cudaMemset(buffer.data(), 0, buffer.bytes()));
    NF_CUDA_CHECK(cudaDeviceSynchronize());
  }
  void enqueue(cudaStream_t stream) {
    mark_sm<<<kMaxSms * 8, 256, 0, stream>>>(reinterpret_cast<int*>(buffer.data()));
    NF_CUDA_CHECK(cudaGetLastError());
  }
  std::set<int> sms() const {
    std::vector<int> counts(kMaxSms);
    NF_CUDA_CHECK(cudaMemcpy(counts.data(), buffer.data(), buffer.bytes(), cudaMemcpyDefault));
    std::set<int> used;
    for (int sm = 0; sm < kMaxSms; ++sm) {
      if (counts[static_cast<size_t>(sm)] > 0) used.insert(sm);
    }
    return used;
  }
};

/// Checks that each lane has run on as many SMs as it says, and no two on the same.
void check_disjoint(const std::vector<std::unique_ptr<Lane>>& lanes,
                    const std::vector<Marks>& marks) {
  std::set<int> all;
  size_t sum = 0;
  for (size_t i = 0; i < lanes.size(); ++i) {
    const std::set<int> used = marks[i].sms();
    CHECK(used.size() == static_cast<size_t>(lanes[i]->width()));
    all.insert(used.begin(), used.end());
    sum += used.size();
  }
  CHECK(all.size() == sum);
}

const std::vector<std::vector<int>> kWidths = {{108, 24},    {24, 108}, {104, 28},
                                               {92, 24, 16}, {84, 48},  {60, 60}};

}  // namespace

TEST_CASE("groups of SMs are dealt by width, and the widest lane takes the rest") {
  const auto dealt = [](const std::vector<int>& widths, int remainder) {
    const cuda::Deal deal = cuda::deal_groups(widths, 16, remainder);
    std::vector<int> sms;
    for (size_t i = 0; i < widths.size(); ++i) {
      sms.push_back(8 * deal.groups[i] + (i == deal.with_remainder ? remainder : 0));
    }
    return sms;
  };
  CHECK(dealt({108, 24}, 4) == std::vector<int>{108, 24});
  CHECK(dealt({104, 28}, 4) == std::vector<int>{104, 28});
  CHECK(dealt({28, 104}, 4) == std::vector<int>{28, 104});
  CHECK(dealt({104, 28}, 0) == std::vector<int>{96, 32});
  CHECK(dealt({92, 24, 16}, 4) == std::vector<int>{92, 24, 16});
  CHECK(dealt({88, 24, 20}, 4) == std::vector<int>{88, 24, 20});
  CHECK(dealt({1, 100}, 0) == std::vector<int>{8, 120});
  CHECK(dealt({12, 11, 100}, 0) == std::vector<int>{16, 8, 104});
  CHECK(dealt({66, 66}, 4) == std::vector<int>{68, 64});
  CHECK_THROWS_WITH_AS(cuda::deal_groups(std::vector<int>(20, 4), 16, 4),
                       doctest::Contains("groups of 8, and the device has 16"), Error);
}

TEST_CASE("a machine without a GPU says so") {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) {
    CHECK_THROWS_WITH_AS(make_backend({.device = parse_device("cuda:99")}),
                         doctest::Contains("device 'cuda:99' does not exist"), Error);
    return;
  }
  CHECK_THROWS_WITH_AS(make_backend({.device = parse_device("cuda")}),
                       doctest::Contains("use device='cpu'"), Error);
}

TEST_CASE("lanes of a partition run on SMs of their own") {
  const auto backend = gpu();
  if (!backend) return;
  for (const std::vector<int>& widths : kWidths) {
    const auto lanes = backend->make_lanes(widths);
    std::vector<Marks> marks;
    int sum = 0;
    for (size_t i = 0; i < lanes.size(); ++i) {
      CHECK(std::abs(lanes[i]->width() - widths[i]) <= (widths.size() == 2 ? 8 : 12));
      sum += lanes[i]->width();
      marks.emplace_back(*backend);
    }
    CHECK(sum == backend->width());
    for (size_t i = 0; i < lanes.size(); ++i) marks[i].enqueue(stream_of(*lanes[i]));
    for (const auto& lane : lanes) drain(*backend, *lane);
    check_disjoint(lanes, marks);
  }
}

TEST_CASE("a captured graph keeps the partition") {
  const auto backend = gpu();
  if (!backend) return;
  const auto origin = backend->make_lane(backend->width());
  const auto lanes = backend->make_lanes({92, 24, 16});
  std::vector<Marks> marks;
  std::vector<std::unique_ptr<Event>> ends;
  for (size_t i = 0; i < lanes.size(); ++i) {
    marks.emplace_back(*backend);
    ends.push_back(backend->make_event());
  }
  const auto forked = backend->make_event();
  const auto run = [&] {
    origin->record(*forked);
    for (size_t i = 0; i < lanes.size(); ++i) {
      lanes[i]->wait(*forked);
      marks[i].enqueue(stream_of(*lanes[i]));
      lanes[i]->record(*ends[i]);
      origin->wait(*ends[i]);
    }
  };
  run();
  const auto graph = backend->capture(*origin, run);
  drain(*backend, *origin);
  for (const Marks& mark : marks) mark.clear();
  for (int replay = 0; replay < 3; ++replay) graph->launch(*origin);
  drain(*backend, *origin);
  check_disjoint(lanes, marks);
}

TEST_CASE("a graph reads what is in memory when it is launched, in the order of its lane") {
  const auto backend = gpu();
  if (!backend) return;
  const auto origin = backend->make_lane(backend->width());
  const auto lanes = backend->make_lanes({108, 24});
  const auto forked = backend->make_event(), handed = backend->make_event();
  const auto joined = backend->make_event();
  const Buffer value = backend->allocate(sizeof(int)), host = backend->allocate_host(sizeof(int));
  auto* number = reinterpret_cast<int*>(host.data());
  const auto run = [&] {
    origin->record(*forked);
    lanes[0]->wait(*forked);
    lanes[0]->delay(std::chrono::microseconds(30));
    add<<<1, 1, 0, stream_of(*lanes[0])>>>(reinterpret_cast<int*>(value.data()), 1);
    lanes[0]->record(*handed);
    lanes[1]->wait(*handed);
    twice<<<1, 1, 0, stream_of(*lanes[1])>>>(reinterpret_cast<int*>(value.data()));
    lanes[1]->record(*joined);
    origin->wait(*joined);
  };
  const auto set = [&](int to) {
    *number = to;
    backend->copy(value.data(), number, sizeof(int), *origin);
    drain(*backend, *origin);
  };
  const auto result = [&] {
    backend->copy(number, value.data(), sizeof(int), *origin);
    drain(*backend, *origin);
    return *number;
  };
  set(1);
  run();
  CHECK(result() == 4);
  const auto graph = backend->capture(*origin, run);
  CHECK(result() == 4);  // capturing runs nothing
  for (int start : {0, 5, -3}) {
    set(start);
    graph->launch(*origin);
    run();  // eager work and graphs share lanes and events
    graph->launch(*origin);
    CHECK(result() == 8 * start + 14);
  }
}

TEST_CASE("a capture that fails says why and leaves the lanes as they were") {
  const auto backend = gpu();
  if (!backend) return;
  const auto origin = backend->make_lane(backend->width());
  const auto lanes = backend->make_lanes({108, 24});
  const auto forked = backend->make_event(), joined = backend->make_event();
  const auto fork = [&] {
    origin->record(*forked);
    lanes[0]->wait(*forked);
  };
  CHECK_THROWS_WITH_AS(backend->capture(*origin,
                                        [&] {
                                          fork();
                                          fail("op 7 is broken");
                                        }),
                       doctest::Contains("op 7 is broken; enforce_eager=True"), Error);
  const Buffer value = backend->allocate(sizeof(int));
  const auto fork_to_work = [&] {
    fork();
    add<<<1, 1, 0, stream_of(*lanes[0])>>>(reinterpret_cast<int*>(value.data()), 1);
  };
  CHECK_THROWS_WITH_AS(backend->capture(*origin, fork_to_work),
                       doctest::Contains("cudaErrorStreamCaptureUnjoined"), Error);
  CHECK_THROWS_AS(backend->capture(*origin, [&] { drain(*backend, *origin); }), Error);
  const auto run = [&] {
    fork_to_work();
    lanes[0]->record(*joined);
    origin->wait(*joined);
  };
  run();
  const auto graph = backend->capture(*origin, run);
  graph->launch(*origin);
  drain(*backend, *origin);
}

TEST_CASE("lanes wider than the device together share it") {
  const auto backend = gpu();
  if (!backend) return;
  const auto lanes = backend->make_lanes({backend->width(), 24});
  CHECK(lanes[0]->width() == backend->width());
  CHECK(lanes[1]->width() == 24);
  CHECK_THROWS_AS(backend->make_lane(0), Error);
  CHECK_THROWS_AS(backend->make_lane(backend->width() + 1), Error);
}

TEST_CASE("events order lanes, also those of different partitions") {
  const auto backend = gpu();
  if (!backend) return;
  const auto lanes = backend->make_lanes({92, 24, 16});
  std::vector<std::unique_ptr<Event>> events;
  for (int i = 0; i < 3; ++i) events.push_back(backend->make_event());
  const Buffer value = backend->allocate(sizeof(int));
  NF_CUDA_CHECK(cudaMemset(value.data(), 0, sizeof(int)));
  NF_CUDA_CHECK(cudaDeviceSynchronize());
  for (int i = 0; i < 300; ++i) {  // all queued at once
    Lane& lane = *lanes[static_cast<size_t>(i % 3)];
    lane.wait(*events[static_cast<size_t>((i + 2) % 3)]);
    if (i % 7 == 0) lane.delay(std::chrono::microseconds(50));
    expect_and_add<<<1, 1, 0, stream_of(lane)>>>(reinterpret_cast<int*>(value.data()), i);
    lane.record(*events[static_cast<size_t>(i % 3)]);
  }
  int result = 0;
  backend->copy(&result, value.data(), sizeof(int), *lanes[2]);
  drain(*backend, *lanes[2]);
  CHECK(result == 300);
}

TEST_CASE("notify calls in order, once the lane is there, and does not hold it up") {
  const auto backend = gpu();
  if (!backend) return;
  const auto lane = backend->make_lane(backend->width());
  const Buffer stamps = backend->allocate_host(2 * sizeof(int64_t));
  auto* ns = reinterpret_cast<int64_t*>(stamps.data());
  ns[0] = ns[1] = 0;
  std::vector<int> order;
  std::atomic<bool> was_reached{false}, is_clean{true};
  std::promise<void> release;
  lane->delay(std::chrono::milliseconds(2));
  lane->stamp(&ns[0]);
  lane->notify([&](std::exception_ptr error) {
    was_reached = ns[0] != 0;
    is_clean = is_clean && error == nullptr;
    release.get_future().wait();
    order.push_back(1);
  });
  lane->notify([&](std::exception_ptr) { order.push_back(2); });
  lane->stamp(&ns[1]);
  drain(*backend, *lane);  // while the first notification waits
  CHECK(order.empty());
  release.set_value();
  std::promise<void> done;
  lane->notify([&](std::exception_ptr) { done.set_value(); });
  done.get_future().wait();
  CHECK(order == std::vector<int>{1, 2});
  CHECK(was_reached);
  CHECK(is_clean);
  CHECK(ns[1] >= ns[0]);
}

TEST_CASE("stamps follow the order of the queue, in nanoseconds") {
  const auto backend = gpu();
  if (!backend) return;
  const auto lane = backend->make_lane(8);
  const Buffer stamps = backend->allocate_host(2 * sizeof(int64_t));
  auto* ns = reinterpret_cast<int64_t*>(stamps.data());
  lane->stamp(&ns[0]);
  lane->delay(std::chrono::milliseconds(3));
  lane->stamp(&ns[1]);
  drain(*backend, *lane);
  CHECK(ns[1] - ns[0] >= 3'000'000);
  CHECK(ns[1] - ns[0] < 300'000'000);
}

TEST_CASE("copies of any size keep the order of a lane") {
  const auto backend = gpu();
  if (!backend) return;
  const auto lane = backend->make_lane(8);
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{4099}, (size_t{1} << 20) + 3}) {
    std::vector<char> from(bytes), to(bytes, 0);
    std::iota(from.begin(), from.end(), 1);
    const Buffer device = backend->allocate(bytes);
    CHECK(device.bytes() == bytes);
    CHECK(reinterpret_cast<uintptr_t>(device.data()) % Arena::kAlignment == 0);
    backend->copy(device.data(), from.data(), bytes, *lane);
    backend->copy(to.data(), device.data(), bytes, *lane);
    drain(*backend, *lane);
    CHECK(to == from);
  }
}

TEST_CASE("the backend describes itself and refuses what it does not have") {
  const auto backend = gpu();
  if (!backend) return;
  MESSAGE(backend->description());
  CHECK(backend->device() == parse_device("cuda"));
  CHECK(backend->width() >= 8);
  CHECK(backend->free_memory() > 0);
  CHECK_THROWS_WITH_AS(backend->allocate(size_t{1} << 50), doctest::Contains("out of memory"),
                       Error);
  drain(*backend, *backend->make_lane(8));  // the refusal left nothing behind
  CHECK_THROWS_AS(make_backend({.device = parse_device("cuda"), .threads = 2}), Error);
}

TEST_CASE("work that fails reaches notify, events and other lanes" * doctest::skip()) {
  const auto backend = gpu();
  if (!backend) return;
  const auto lane = backend->make_lane(8), other = backend->make_lane(8);
  const auto event = backend->make_event();
  lane->delay(std::chrono::milliseconds(20));  // all below is queued before the failure
  write_nowhere<<<1, 1, 0, stream_of(*lane)>>>();
  std::promise<std::string> told;
  lane->notify([&](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
      told.set_value("");
    } catch (const Error& e) {
      told.set_value(e.what());
    }
  });
  lane->record(*event);
  other->wait(*event);
  CHECK(told.get_future().get().find("cudaErrorIllegalAddress") != std::string::npos);
  CHECK_THROWS_AS(event->synchronize(), Error);
  CHECK_THROWS_AS(drain(*backend, *other), Error);
}
