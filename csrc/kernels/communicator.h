#pragma once

#include <cstddef>
#include <exception>

#include "kernels/ops.h"

namespace nanoflow {

class Lane;

/// The collectives of one rank with the others of its group. Every rank enqueues the same ones in
/// the same order, at any time one lane's; a rank alone is a group of size 1. Only ops and the
/// pipeline's worker come here.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// How many ranks take part: one, where the others are only simulated.
  virtual int members() const { return size(); }

  /// Whether AllReduce may norm: each row once, by the rank that sums it.
  virtual bool norms_sums() const { return false; }

  /// Enqueue the op, whose shapes have been checked.
  virtual void run(const AllReduce& op, Lane& lane) = 0;
  virtual void run(const AllGather& op, Lane& lane) = 0;

  /// Bytes of AllGather::work for parts of so many bytes each; 0 where it needs none.
  virtual size_t gather_work_bytes(size_t) const { return 0; }
  /// Takes the memory that collectives on lanes of this width need, for all ranks of the process.
  virtual void prepare(int /*lane_width*/) {}
  /// Blocks the calling host thread until all ranks have called it, where the backend needs that
  /// before a rank may do what blocks its device: allocate, load kernels, capture a graph. Throws
  /// the cause of an abort.
  virtual void meet() {}
  /// Ends all collectives of the group with an error, those that wait for a rank that will never
  /// come among them. The first cause stays and is returned; there is no way back.
  virtual std::exception_ptr abort(std::exception_ptr cause) = 0;
  /// The cause of an abort, or null.
  virtual std::exception_ptr cause() const = 0;
};

}  // namespace nanoflow
