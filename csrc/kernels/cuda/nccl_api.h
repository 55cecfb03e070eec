#pragma once

#include <cuda_runtime_api.h>

#include <climits>
#include <cstddef>
#include <memory>
#include <string>

namespace nanoflow::cuda {

// What we use of NCCL (2.18 or newer), declared here so that neither its header nor the library is
// needed to build: the library is opened when several GPUs are asked for.

struct NcclComm;

struct NcclUniqueId {
  char bytes[128];
};

enum NcclResult : int { kNcclSuccess = 0 };
enum NcclDType : int { kNcclFloat16 = 6, kNcclFloat32 = 7, kNcclBFloat16 = 9 };
enum NcclOperation : int { kNcclSum = 0 };

/// ncclConfig_t as of 2.18; newer libraries take its size and version into account.
struct NcclConfig {
  static constexpr int kUndefined = INT_MIN;

  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = 1;
  int cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
};

struct NcclApi {
  NcclResult (*get_version)(int* version);
  NcclResult (*get_unique_id)(NcclUniqueId* id);
  NcclResult (*comm_init_rank_config)(NcclComm** comm, int ranks, NcclUniqueId id, int rank,
                                      NcclConfig* config);
  NcclResult (*comm_destroy)(NcclComm* comm);
  NcclResult (*comm_abort)(NcclComm* comm);
  NcclResult (*group_start)();
  NcclResult (*group_end)();
  NcclResult (*all_reduce)(const void* from, void* to, size_t count, NcclDType dtype,
                           NcclOperation operation, NcclComm* comm, cudaStream_t stream);
  NcclResult (*all_gather)(const void* from, void* to, size_t count, NcclDType dtype,
                           NcclComm* comm, cudaStream_t stream);
  const char* (*get_error_string)(NcclResult result);
  const char* (*get_last_error)(NcclComm* comm);

  /// Throws Error naming the call and what NCCL says, where the result is no success.
  void check(NcclResult result, const char* call) const;
};

/// Opens the library at `path`, or, where that is empty, the one that the system finds; it stays
/// open for good. Throws Error saying how to get NCCL where there is none, or it is too old.
NcclApi open_nccl(const std::string& path);

}  // namespace nanoflow::cuda
