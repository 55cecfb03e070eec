#include "kernels/cuda/nccl_api.h"

#include <dlfcn.h>

#include "core/error.h"

namespace nanoflow::cuda {
namespace {

constexpr const char* kLibrary = "libnccl.so.2";
constexpr int kOldest = 21800;  // 2.18.0

}  // namespace

void NcclApi::check(NcclResult result, const char* call) const {
  if (result == kNcclSuccess) return;
  const char* detail = get_last_error(nullptr);
  fail("NCCL: ", call, " failed: ", get_error_string(result), " (",
       detail == nullptr || *detail == '\0' ? "NCCL_DEBUG=WARN tells more" : detail, ")");
}

NcclApi open_nccl(const std::string& path) {
  const char* name = path.empty() ? kLibrary : path.c_str();
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  NF_CHECK(library != nullptr, "tensor parallelism on GPUs needs NCCL, but ", dlerror(),
           "; pip install nvidia-nccl-cu13");
  const auto find = [&](auto& function, const char* symbol) {
    void* found = dlsym(library, symbol);
    NF_CHECK(found != nullptr, name, " has no ", symbol,
             "; tensor parallelism needs NCCL 2.18 or newer: pip install -U nvidia-nccl-cu13");
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
  };
  NcclApi api{};
  find(api.get_version, "ncclGetVersion");
  find(api.get_unique_id, "ncclGetUniqueId");
  find(api.comm_init_rank_config, "ncclCommInitRankConfig");
  find(api.comm_destroy, "ncclCommDestroy");
  find(api.comm_abort, "ncclCommAbort");
  find(api.group_start, "ncclGroupStart");
  find(api.group_end, "ncclGroupEnd");
  find(api.all_reduce, "ncclAllReduce");
  find(api.all_gather, "ncclAllGather");
  find(api.get_error_string, "ncclGetErrorString");
  find(api.get_last_error, "ncclGetLastError");
  int version = 0;
  api.check(api.get_version(&version), "ncclGetVersion");
  NF_CHECK(version >= kOldest, name, " is version ", version,
           "; tensor parallelism needs NCCL 2.18 or newer: pip install -U nvidia-nccl-cu13");
  return api;
}

}  // namespace nanoflow::cuda
