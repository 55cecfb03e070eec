#include "kernels/cpu/lane.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "kernels/backend.h"

using namespace nanoflow;
using cpu::CpuLane;
using cpu::Worker;

namespace {

std::shared_ptr<Backend> two_threads() {
  return make_backend({.device = {}, .threads = 2, .isa = "auto"});
}

/// Blocks until the lane has run what is queued; rethrows its error.
void drain(Lane& lane) {
  const auto event = cpu::make_cpu_event();
  lane.record(*event);
  event->synchronize();
}

std::string error_of(Lane& lane) {
  try {
    drain(lane);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("a lane runs its tasks in order, each on all threads") {
  for (int width : {1, 2, 3}) {
    CpuLane lane(width);
    std::vector<int> order;
    std::atomic<int> calls{0};
    for (int task = 0; task < 500; ++task) {
      lane.enqueue([&, task](const Worker& worker) {
        calls.fetch_add(1);
        CHECK(worker.width() == width);
        if (worker.index() == 0) order.push_back(task);
      });
    }
    drain(lane);
    std::vector<int> expected(500);
    std::iota(expected.begin(), expected.end(), 0);
    CHECK(order == expected);
    CHECK(calls == 500 * width);
  }
}

TEST_CASE("a lane runs what is queued before it ends") {
  std::atomic<int> calls{0};
  {
    CpuLane lane(2);
    lane.delay(std::chrono::milliseconds(2));
    for (int task = 0; task < 10; ++task) lane.enqueue([&](const Worker&) { ++calls; });
  }
  CHECK(calls == 20);
}

TEST_CASE("sync separates the phases of a task") {
  for (int width : {2, 3, 5}) {
    CpuLane lane(width);
    std::vector<int> values(static_cast<size_t>(width));
    std::atomic<int> wrong{0};
    lane.enqueue([&](const Worker& worker) {
      for (int round = 1; round <= 200; ++round) {
        values[static_cast<size_t>(worker.index())] = round;
        worker.sync();
        for (int value : values) wrong += value != round;
        worker.sync();
      }
    });
    drain(lane);
    CHECK(wrong == 0);
  }
}

TEST_CASE("share covers a range once, in multiples of the grain") {
  for (int width : {1, 2, 3, 7}) {
    for (int64_t count : {0, 1, 15, 16, 17, 100, 576}) {
      for (int64_t grain : {1, 4, 16}) {
        CpuLane lane(width);
        std::vector<Worker::Range> ranges(static_cast<size_t>(width));
        lane.enqueue([&](const Worker& worker) {
          ranges[static_cast<size_t>(worker.index())] = worker.share(count, grain);
        });
        drain(lane);
        int64_t next = 0;
        for (const Worker::Range& range : ranges) {
          CHECK(range.begin == next);
          CHECK(range.begin <= range.end);
          CHECK((range.end % grain == 0 || range.end == count));
          next = range.end;
        }
        CHECK(next == count);
      }
    }
  }
}

TEST_CASE("claim gives every number to one thread, from zero in each task") {
  CpuLane lane(3);
  for (int task = 0; task < 20; ++task) {
    std::vector<std::atomic<int>> taken(100);
    lane.enqueue([&](const Worker& worker) {
      for (int64_t i = worker.claim(); i < 100; i = worker.claim()) ++taken[static_cast<size_t>(i)];
    });
    drain(lane);
    CHECK(std::all_of(taken.begin(), taken.end(), [](const auto& count) { return count == 1; }));
  }
}

TEST_CASE("scratch is shared by the threads, grows and is reused") {
  CpuLane lane(2);
  std::vector<std::byte*> seen;
  for (size_t bytes : {size_t{100}, size_t{100000}, size_t{10}}) {
    lane.enqueue(
        [&, bytes](const Worker& worker) {
          worker.scratch()[worker.index() == 0 ? 0 : bytes - 1] = std::byte{1};
          if (worker.index() == 0) seen.push_back(worker.scratch());
        },
        bytes);
  }
  drain(lane);
  for (std::byte* memory : seen) CHECK(reinterpret_cast<uintptr_t>(memory) % 64 == 0);
  CHECK(seen[1] == seen[2]);
}

TEST_CASE("scratch that cannot be had is the lane's error") {
  CpuLane lane(2);
  bool was_run = false;
  lane.enqueue([&](const Worker&) { was_run = true; }, size_t{1} << 60);
  CHECK_THROWS_AS(drain(lane), Error);
  CHECK_FALSE(was_run);
}

TEST_CASE("events order lanes over many rounds of recording") {
  CpuLane first(2), second(1), third(2);
  const auto a = cpu::make_cpu_event(), b = cpu::make_cpu_event(), c = cpu::make_cpu_event();
  int value = 0;  // each lane in turn; a race without the events
  std::atomic<int> wrong{0};
  const auto step = [&](CpuLane& lane, int modulus) {
    lane.enqueue([&, modulus](const Worker& worker) {
      if (worker.index() != 0) return;
      wrong += value % 3 != modulus;
      ++value;
    });
  };
  for (int round = 0; round < 300;
       ++round) {  // all queued at once: waits mean records queued before
    first.wait(*c);
    step(first, 0);
    first.record(*a);
    second.wait(*a);
    step(second, 1);
    second.record(*b);
    third.wait(*b);
    step(third, 2);
    third.record(*c);
  }
  c->synchronize();
  CHECK(value == 900);
  CHECK(wrong == 0);
}

TEST_CASE("a wait refers to the record queued before it") {
  CpuLane slow(1), fast(1);
  const auto event = cpu::make_cpu_event();
  std::atomic<bool> release{false}, is_second_done{false};
  fast.wait(*event);  // never recorded: returns at once
  slow.record(*event);
  fast.wait(*event);
  bool saw_second = true;
  fast.enqueue([&](const Worker&) {
    saw_second = is_second_done;
    release = true;
  });
  slow.enqueue([&](const Worker&) {
    while (!release) std::this_thread::yield();
    is_second_done = true;
  });
  slow.record(*event);
  event->synchronize();
  CHECK(is_second_done);
  CHECK_FALSE(saw_second);
}

TEST_CASE("an event that was never recorded does not block") {
  const auto event = cpu::make_cpu_event();
  event->synchronize();
  CpuLane lane(2);
  lane.wait(*event);
  drain(lane);
}

TEST_CASE("an event may be destroyed once it was queued") {
  CpuLane recorder(1), waiter(2);
  bool is_recorded = false, saw = false;
  {
    const auto event = cpu::make_cpu_event();
    recorder.delay(std::chrono::milliseconds(2));
    recorder.enqueue([&](const Worker&) { is_recorded = true; });
    recorder.record(*event);
    waiter.wait(*event);
  }
  waiter.enqueue([&](const Worker& worker) {
    if (worker.index() == 0) saw = is_recorded;
  });
  drain(waiter);
  CHECK(saw);
}

TEST_CASE("an error skips the tasks behind it and reaches notify, events and waiting lanes") {
  CpuLane failing(2), waiting(2);
  const auto event = cpu::make_cpu_event();
  std::atomic<int> later{0};
  std::string notified;
  failing.enqueue([](const Worker& worker) {
    if (worker.index() == 1) throw std::runtime_error("first");
  });
  failing.enqueue([&](const Worker&) { ++later; });
  failing.enqueue([](const Worker&) { throw std::runtime_error("second"); });
  failing.notify([&](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::exception& e) {
      notified = e.what();
    }
  });
  failing.record(*event);
  waiting.wait(*event);
  waiting.enqueue([&](const Worker&) { ++later; });
  CHECK(error_of(waiting) == "first");
  CHECK(error_of(failing) == "first");
  CHECK_THROWS_WITH(event->synchronize(), "first");
  CHECK(notified == "first");
  CHECK(later == 0);

  for (CpuLane* lane : {&failing, &waiting}) {
    lane->clear_error();
    lane->enqueue([&](const Worker&) { ++later; });
    CHECK(error_of(*lane) == "");
  }
  CHECK(later == 4);
}

TEST_CASE("notify gets no error where there is none") {
  CpuLane lane(1);
  bool is_clean = false;
  lane.notify([&](std::exception_ptr error) { is_clean = error == nullptr; });
  drain(lane);
  CHECK(is_clean);
}

TEST_CASE("a thread that fails frees the others from sync") {
  for (int width : {2, 3, 4}) {
    CpuLane lane(width);
    for (int round = 0; round < 100; ++round) {
      std::atomic<int> beyond{0};
      lane.enqueue([&](const Worker& worker) {
        worker.sync();
        if (worker.index() == round % width) fail("round ", round);
        worker.sync();
        ++beyond;
      });
      CHECK(error_of(lane) == "round " + std::to_string(round));
      CHECK(beyond == 0);
      lane.clear_error();
      std::atomic<int> count{0};
      lane.enqueue([&](const Worker& worker) {  // the barrier is whole again
        ++count;
        worker.sync();
        if (count != width) fail("passed a barrier of ", width, " after ", count);
      });
      drain(lane);
    }
  }
}

TEST_CASE("three lanes wider than the machine make progress") {
  CpuLane lanes[] = {CpuLane(2), CpuLane(2), CpuLane(3)};
  const auto origin = cpu::make_cpu_event();
  std::vector<std::unique_ptr<Event>> ends;
  for (int i = 0; i < 3; ++i) ends.push_back(cpu::make_cpu_event());
  std::atomic<int64_t> sum{0};
  for (int step = 0; step < 30; ++step) {
    lanes[0].record(*origin);
    for (int i = 0; i < 3; ++i) {
      lanes[i].wait(*origin);
      for (int task = 0; task < 10; ++task) {
        lanes[i].enqueue([&](const Worker& worker) {
          for (int phase = 0; phase < 3; ++phase) {
            sum += worker.index() + 1;
            worker.sync();
          }
        });
      }
      lanes[i].record(*ends[static_cast<size_t>(i)]);
      lanes[0].wait(*ends[static_cast<size_t>(i)]);
    }
  }
  drain(lanes[0]);
  CHECK(sum == 30 * 10 * 3 * (3 + 3 + 6));
}

TEST_CASE("stamps follow the order of the queue") {
  CpuLane lane(2);
  int64_t before = 0, after = 0;
  lane.stamp(&before);
  lane.delay(std::chrono::milliseconds(3));
  lane.stamp(&after);
  drain(lane);
  CHECK(after - before >= 3'000'000);
}

TEST_CASE("the backend copies in the order of a lane") {
  const auto backend = two_threads();
  const auto lane = backend->make_lane(2);
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{4099}, (size_t{1} << 20) + 3}) {
    std::vector<char> from(bytes), to(bytes, 0);
    std::iota(from.begin(), from.end(), 1);
    backend->copy(to.data(), from.data(), bytes, *lane);
    drain(*lane);
    CHECK(to == from);
  }
}

TEST_CASE("the backend describes itself and gives aligned memory") {
  const auto backend = two_threads();
  CHECK(backend->width() == 2);
  CHECK(backend->description() == "cpu (2 threads, " + cpu_isas().back() + ")");
  CHECK(backend->free_memory() > 0);
  for (size_t bytes : {size_t{0}, size_t{100}, size_t{3} << 20}) {
    const Buffer buffer = backend->allocate(bytes);
    CHECK(buffer.bytes() == bytes);
    CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % Arena::kAlignment == 0);
  }
  CHECK(make_backend({})->width() >= 1);
}

TEST_CASE("the backend refuses what it does not have") {
  CHECK_THROWS_WITH_AS(make_backend({.device = {}, .threads = 1, .isa = "avx9"}),
                       doctest::Contains("instruction set 'avx9' is not one of those this machine "
                                         "has: auto, generic"),
                       Error);
  CHECK_THROWS_AS(make_backend({.device = {}, .threads = -1, .isa = "auto"}), Error);
  CHECK_THROWS_AS(two_threads()->make_lane(0), Error);
  CHECK_THROWS_AS(two_threads()->allocate(size_t{1} << 60), Error);
  for (const std::string& isa : cpu_isas()) {
    CHECK(make_backend({.device = {}, .threads = 1, .isa = isa})->description() ==
          "cpu (1 thread, " + isa + ")");
  }
}
