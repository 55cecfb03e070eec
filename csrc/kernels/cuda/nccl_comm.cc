#include "kernels/cuda/nccl_comm.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <thread>
#include <utility>

#include "core/error.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/columns.h"
#include "kernels/cuda/lane.h"
#include "kernels/cuda/nccl_api.h"
#include "kernels/meeting.h"

namespace nanoflow::cuda {
namespace {

constexpr int kMostCtas = 32;  // lanes as wide as this are not limited

NcclDType nccl_dtype(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return kNcclBFloat16;
    case DType::kF16:
      return kNcclFloat16;
    case DType::kF32:
      return kNcclFloat32;
    default:
      fail("collectives on GPUs have bfloat16, float16 and float32, not ", dtype);
  }
}

/// All ranks of the process.
class Group {
 public:
  Group(std::vector<int> devices, const std::string& library)
      : meeting_(static_cast<int>(devices.size())),
        devices_(std::move(devices)),
        api_(open_nccl(library)) {}
  Group(const Group&) = delete;
  ~Group() {
    for (const auto& [width, comms] : comms_) {
      for (NcclComm* comm : comms) api_.comm_destroy(comm);
    }
  }

  int size() const { return static_cast<int>(devices_.size()); }
  const NcclApi& api() const { return api_; }
  Meeting& meeting() { return meeting_; }

  /// Makes the communicators of a width of lane, once.
  void prepare(int width) {
    const std::unique_lock lock(mutex_);
    check_alive();
    make(std::min(width, kMostCtas));
  }

  /// Calls fn with the communicator of a rank, which is not aborted meanwhile.
  template <typename Fn>
  void use(int rank, int width, const Fn& fn) {
    const int ctas = std::min(width, kMostCtas);
    {
      const std::shared_lock lock(mutex_);
      check_alive();
      if (const auto found = comms_.find(ctas); found != comms_.end()) {
        return fn(found->second[rank]);
      }
    }
    prepare(width);
    const std::shared_lock lock(mutex_);
    check_alive();
    fn(comms_.at(ctas)[rank]);
  }

  /// Every communicator is told to end what it runs, and is freed once no graph uses it any more.
  /// NCCL waits for that, for ever where a device has failed for good: so it does in threads that
  /// nobody joins. Those own what they use.
  std::exception_ptr abort(std::exception_ptr cause) {
    const std::exception_ptr first = meeting_.abort(std::move(cause));
    const std::unique_lock lock(mutex_);
    for (auto& [width, comms] : comms_) {
      std::thread([api = api_, comms = std::move(comms)] {
        for (NcclComm* comm : comms) api.comm_abort(comm);
      }).detach();
    }
    comms_.clear();
    return first;
  }

 private:
  void check_alive() const {
    if (const std::exception_ptr cause = meeting_.cause()) std::rethrow_exception(cause);
  }

  void make(int ctas) {
    if (comms_.contains(ctas)) return;
    int device = 0;  // the caller's
    NF_CUDA_CHECK(cudaGetDevice(&device));
    NcclUniqueId id;
    api_.check(api_.get_unique_id(&id), "ncclGetUniqueId");
    NcclConfig config;
    if (ctas < kMostCtas) {
      config.max_ctas = ctas;
      config.cluster_size = 0;  // a part of the SMs may have no room for clusters
    }
    std::vector<NcclComm*> comms(devices_.size());
    api_.check(api_.group_start(), "ncclGroupStart");
    for (int rank = 0; rank < size(); ++rank) {
      NF_CUDA_CHECK(cudaSetDevice(devices_[rank]));
      api_.check(api_.comm_init_rank_config(&comms[rank], size(), id, rank, &config),
                 "ncclCommInitRankConfig");
    }
    api_.check(api_.group_end(), "ncclGroupEnd");
    NF_CUDA_CHECK(cudaSetDevice(device));
    comms_[ctas] = std::move(comms);
  }

  Meeting meeting_;
  std::vector<int> devices_;  // by rank
  NcclApi api_;
  std::shared_mutex mutex_;
  std::map<int, std::vector<NcclComm*>> comms_;  // by most CTAs, then by rank
};

class NcclCommunicator : public Communicator {
 public:
  NcclCommunicator(std::shared_ptr<Group> group, int rank)
      : group_(std::move(group)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  size_t gather_work_bytes(size_t part_bytes) const override {
    return part_bytes * static_cast<size_t>(size());
  }
  void prepare(int lane_width) override { group_->prepare(lane_width); }
  void meet() override { group_->meeting().wait(); }

  void run(const AllReduce& op, Lane& lane) override {
    const NcclDType dtype = nccl_dtype(op.x.dtype());
    const auto count = static_cast<size_t>(op.x.numel());
    void* x = op.x.bytes();
    launch(cuda_lane(lane), "ncclAllReduce", [&](NcclComm* comm, cudaStream_t stream) {
      return group_->api().all_reduce(x, x, count, dtype, kNcclSum, comm, stream);
    });
  }

  /// Through `work`, where the ranks' parts lie one after another.
  void run(const AllGather& op, Lane& lane) override {
    const NcclDType dtype = nccl_dtype(op.x.dtype());
    const int64_t columns = op.x.size(1), count = op.x.numel();
    const size_t part_bytes = static_cast<size_t>(count) * size_of(op.x.dtype());
    const size_t needed = gather_work_bytes(part_bytes);
    NF_CHECK(op.work && op.work.span_bytes() >= needed, "all_gather of ", op.x, " on a GPU needs ",
             needed, " bytes of work, not ", op.work);
    CudaLane& own = cuda_lane(lane);
    std::byte* part = op.work.bytes() + part_bytes * static_cast<size_t>(rank_);
    place_columns(
        {.data = op.x.bytes(), .columns = columns, .row_stride = op.x.stride(0), .part_stride = 0},
        Tensor(part, op.x.dtype(), op.x.device(), {op.x.size(0), columns}), own);
    launch(own, "ncclAllGather", [&](NcclComm* comm, cudaStream_t stream) {
      return group_->api().all_gather(part, op.work.bytes(), static_cast<size_t>(count), dtype,
                                      comm, stream);
    });
    place_columns(
        {.data = op.work.bytes(), .columns = columns, .row_stride = columns, .part_stride = count},
        op.out, own);
  }

  std::exception_ptr abort(std::exception_ptr cause) override {
    return group_->abort(std::move(cause));
  }
  std::exception_ptr cause() const override { return group_->meeting().cause(); }

 private:
  template <typename Fn>
  void launch(CudaLane& lane, const char* call, const Fn& fn) {
    cudaStreamCaptureStatus status;
    NF_CUDA_CHECK(cudaStreamIsCapturing(lane.stream(), &status));
    const bool is_eager = status == cudaStreamCaptureStatusNone;
    if (is_eager) meet();
    group_->use(rank_, lane.width(),
                [&](NcclComm* comm) { group_->api().check(fn(comm, lane.stream()), call); });
    if (is_eager) meet();
  }

  std::shared_ptr<Group> group_;
  int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> make_nccl_communicators(const std::vector<int>& devices,
                                                                   const std::string& library) {
  const auto group = std::make_shared<Group>(devices, library);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int rank = 0; rank < group->size(); ++rank) {
    ranks.push_back(std::make_unique<NcclCommunicator>(group, rank));
  }
  return ranks;
}

}  // namespace nanoflow::cuda
