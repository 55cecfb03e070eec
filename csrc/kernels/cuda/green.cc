#include "kernels/cuda/green.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <string>

#include "core/error.h"
#include "kernels/cuda/check.h"

namespace nanoflow::cuda {
namespace {

std::string join(const std::vector<int>& values) {
  std::ostringstream text;
  for (size_t i = 0; i < values.size(); ++i) text << (i == 0 ? "" : ", ") << values[i];
  return text.str();
}

size_t widest(const std::vector<int>& widths) {
  return static_cast<size_t>(std::max_element(widths.begin(), widths.end()) - widths.begin());
}

/// All SMs of a device, dealt into groups. Contexts must come from one split: those of two splits
/// may overlap.
struct Split {
  std::vector<CUdevResource> groups;
  CUdevResource remainder{};

  explicit Split(CUdevice device) {
    CUdevResource all{};
    NF_DRIVER_CALL(cuDeviceGetDevResource, device, &all, CU_DEV_RESOURCE_TYPE_SM);
    unsigned count = all.sm.smCount / kSmGroup;
    groups.resize(count);
    NF_DRIVER_CALL(cuDevSmResourceSplitByCount, groups.data(), &count, &all, &remainder, 0,
                   kSmGroup);
    groups.resize(count);
  }
};

int sm_count_of(const std::vector<CUdevResource>& resources) {
  return std::accumulate(resources.begin(), resources.end(), 0,
                         [](int sum, const CUdevResource& resource) {
                           return sum + static_cast<int>(resource.sm.smCount);
                         });
}

std::unique_ptr<GreenContext> make_context(CUdevice device, std::vector<CUdevResource> resources) {
  CUdevResourceDesc description;
  NF_DRIVER_CALL(cuDevResourceGenerateDesc, &description, resources.data(),
                 static_cast<unsigned>(resources.size()));
  CUgreenCtx context;
  NF_DRIVER_CALL(cuGreenCtxCreate, &context, description, device, CU_GREEN_CTX_DEFAULT_STREAM);
  return std::make_unique<GreenContext>(context, sm_count_of(resources));
}

}  // namespace

GreenContext::~GreenContext() {
  driver_function<decltype(&cuGreenCtxDestroy)>("cuGreenCtxDestroy")(context_);
}

cudaStream_t GreenContext::make_stream() const {
  CUstream stream;
  NF_DRIVER_CALL(cuGreenCtxStreamCreate, &stream, context_, CU_STREAM_NON_BLOCKING, 0);
  return stream;
}

std::vector<int> deal_groups(const std::vector<int>& widths, int groups) {
  std::vector<int> dealt;
  for (int width : widths) dealt.push_back(std::max(1, (width + kSmGroup / 2) / kSmGroup));
  int& rest = dealt[widest(widths)];
  rest = 0;
  rest = groups - std::accumulate(dealt.begin(), dealt.end(), 0);
  NF_CHECK(rest >= 1, "lanes of ", join(widths), " SMs do not fit: SMs are dealt in groups of ",
           kSmGroup, ", and the device has ", groups, " of them; use fewer lanes or other widths");
  return dealt;
}

std::vector<std::unique_ptr<GreenContext>> partition_device(int device,
                                                            const std::vector<int>& widths) {
  CUdevice handle;
  NF_DRIVER_CALL(cuDeviceGet, &handle, device);
  const Split split(handle);
  const std::vector<int> dealt = deal_groups(widths, static_cast<int>(split.groups.size()));
  std::vector<std::unique_ptr<GreenContext>> contexts;
  auto next = split.groups.begin();
  for (size_t i = 0; i < widths.size(); ++i) {
    std::vector<CUdevResource> resources(next, next + dealt[i]);
    next += dealt[i];
    if (i == widest(widths) && split.remainder.type == CU_DEV_RESOURCE_TYPE_SM &&
        split.remainder.sm.smCount > 0) {
      resources.push_back(split.remainder);
    }
    contexts.push_back(make_context(handle, std::move(resources)));
  }
  return contexts;
}

}  // namespace nanoflow::cuda
