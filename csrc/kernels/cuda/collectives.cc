#include "kernels/cuda/kernels.h"
#include "kernels/shapes.h"

namespace nanoflow::cuda {

void CudaKernels::run(const AllReduce& op, Lane& lane) {
  check_shapes(op, communicator_->norms_sums());
  communicator_->run(op, lane);
}

void CudaKernels::run(const AllGather& op, Lane& lane) {
  check_shapes(op, communicator_->size());
  communicator_->run(op, lane);
}

}  // namespace nanoflow::cuda
