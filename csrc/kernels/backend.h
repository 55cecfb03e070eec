#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/device.h"
#include "kernels/communicator.h"
#include "kernels/kernels.h"

namespace nanoflow {

/// A point in a lane's queue. wait() and record() refer to the latest record() enqueued before the
/// call, so an event may be recorded again every step.
class Event {
 public:
  virtual ~Event() = default;
  /// Blocks the calling host thread until the latest record has been reached. Rethrows the error of
  /// the lane that recorded it.
  virtual void synchronize() = 0;
};

/// One ordered queue of one fixed width (threads on a CPU, SMs on a GPU). Everything enqueued runs
/// in order; calls come from one host thread at a time. After a failure the rest of the queue is
/// skipped, except records and notifications, until clear_error().
class Lane {
 public:
  virtual ~Lane() = default;
  virtual int width() const = 0;
  virtual void wait(Event& event) = 0;
  virtual void record(Event& event) = 0;
  /// Calls fn on an unspecified thread once reached, with the lane's first error or null. An error
  /// of a lane spreads to every lane that waits for its events.
  virtual void notify(std::function<void(std::exception_ptr)> fn) = 0;
  /// Writes the time in nanoseconds (one clock for all lanes of a backend) once reached, to memory
  /// of Backend::allocate_host().
  virtual void stamp(int64_t* ns) = 0;
  /// Idles for a while once reached: makes races visible in tests.
  virtual void delay(std::chrono::microseconds time) = 0;
  virtual void clear_error() = 0;
  /// Name what is enqueued in between, for a profiler that is watching. Ranges nest.
  virtual void begin_range(const char*) {}
  virtual void end_range() {}
};

/// Work recorded once, to be launched again and again. It reads and writes the same addresses each
/// time, and must not be destroyed before its last launch has run.
class Graph {
 public:
  virtual ~Graph() = default;
  /// Enqueues the whole, between what the lane has been given and what it will be given next.
  virtual void launch(Lane& lane) = 0;
  /// Device memory that it takes, as far as that can be told.
  virtual size_t bytes() const = 0;
};

struct BackendOptions {
  Device device;
  int threads = 0;                // CPU: total lane width, 0 = the cores this process may use
  std::string isa = "auto";       // CPU: auto, generic, avx2, avx512, avx512_bf16, amx
  std::string nccl_library = {};  // GPUs: path of libnccl.so.2; empty: where the system finds it
  // GPUs: what is computed for a row depends on no other row, as always on a CPU; slower.
  bool batch_invariant = false;
  bool nccl_alone = false;  // GPUs: collectives through NCCL for a rank alone, too
  // To measure a rank without the others: rank 0 of so many, whose collectives copy its own data
  // instead, as many bytes. What it computes is no model's.
  int simulated_ranks = 0;
};

/// Memory, lanes, events and kernels of one device for one rank.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual Device device() const = 0;
  /// One line for tables and results, as in "cpu (2 threads, amx)".
  virtual std::string description() const = 0;
  /// The whole device's width: the sum of the widths of lanes that are meant to run side by side.
  virtual int width() const = 0;
  /// Dense rows are padded to a multiple of this.
  virtual int row_granularity() const = 0;
  /// Bytes: of the device, and of it what nobody uses.
  virtual size_t total_memory() const = 0;
  virtual size_t free_memory() const = 0;
  virtual Buffer allocate(size_t bytes) = 0;
  /// Host memory that copies reach at full speed.
  virtual Buffer allocate_host(size_t bytes) = 0;
  virtual std::unique_ptr<Lane> make_lane(int width) = 0;
  /// Lanes that run side by side, each on its own part of the device where that can be arranged.
  virtual std::vector<std::unique_ptr<Lane>> make_lanes(const std::vector<int>& widths);
  /// A lane that only copies, beside all others: it takes as little of the device as can be.
  virtual std::unique_ptr<Lane> make_copy_lane() { return make_lane(1); }
  virtual std::unique_ptr<Event> make_event() = 0;
  /// Enqueues a copy between any two of host and device memory.
  virtual void copy(void* to, const void* from, size_t bytes, Lane& lane) = 0;
  virtual Kernels& kernels() = 0;
  /// What collectives run on; alive as long as the backend.
  virtual Communicator& communicator() = 0;
  /// Records what `enqueue` gives to `origin`, and to lanes that it forks from origin and joins
  /// into it again; nothing runs. The same work must have run before, so that all it needs exists.
  /// Here a graph is `enqueue` itself, called again at every launch.
  virtual std::unique_ptr<Graph> capture(Lane& origin, std::function<void()> enqueue);
  /// Why the kernels cannot run models of this dtype and head dim, empty where they can.
  virtual std::string model_problem(DType dtype, int head_dim) const;
  /// Bytes of PlanAttention::work for batches of up to these sizes; 0 where attention needs no
  /// plan.
  virtual size_t attention_work_bytes(int requests, int rows, int num_heads,
                                      int num_kv_heads) const;
};

/// The ranks of one process that share every layer of a model (tensor parallelism), in order. On a
/// CPU they divide the threads, at least one each; on GPUs they are devices index, index + 1, ...
/// Errors as make_backend; also where there are fewer GPUs than ranks.
std::vector<std::shared_ptr<Backend>> make_backends(const BackendOptions& options, int ranks);
/// Throws Error for a device this build or machine does not have, and says how to get it.
std::shared_ptr<Backend> make_backend(const BackendOptions& options);
/// What that error would say for a CUDA device, empty where it can be used. Never throws, and takes
/// no memory where there is no usable device.
std::string cuda_problem(int index);
/// The PCI bus id of a CUDA device, as in "0000:3B:00.0". Throws Error where there is none.
std::string cuda_bus_id(int index);

/// Defined by kernels/cpu.
std::vector<std::shared_ptr<Backend>> make_cpu_backends(const BackendOptions& options, int ranks);
/// The instruction sets this machine can run, slowest first; the last is what "auto" takes.
std::vector<std::string> cpu_isas();

}  // namespace nanoflow
