#include "kernels/cuda/green.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>

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

Deal deal_with(const std::vector<int>& widths, int groups, int remainder, size_t with_remainder) {
  Deal deal{.groups = {}, .with_remainder = with_remainder};
  for (size_t i = 0; i < widths.size(); ++i) {
    const int width = widths[i] - (i == with_remainder ? remainder : 0);
    deal.groups.push_back(std::max(1, (width + kSmGroup / 2) / kSmGroup));
  }
  int& rest = deal.groups[widest(widths)];
  rest = 0;
  rest = groups - std::accumulate(deal.groups.begin(), deal.groups.end(), 0);
  return deal;
}

/// SMs that lanes have too many or too few.
int misfit(const Deal& deal, const std::vector<int>& widths, int remainder) {
  int sum = 0;
  for (size_t i = 0; i < widths.size(); ++i) {
    const int got = deal.groups[i] * kSmGroup + (i == deal.with_remainder ? remainder : 0);
    sum += std::abs(got - widths[i]);
  }
  return sum;
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

Deal deal_groups(const std::vector<int>& widths, int groups, int remainder) {
  const size_t first = widest(widths);
  Deal best = deal_with(widths, groups, remainder, first);
  for (size_t lane = 0; lane < widths.size(); ++lane) {
    Deal other = deal_with(widths, groups, remainder, lane);
    if (misfit(other, widths, remainder) < misfit(best, widths, remainder)) best = std::move(other);
  }
  NF_CHECK(best.groups[first] >= 1, "lanes of ", join(widths),
           " SMs do not fit: SMs are dealt in groups of ", kSmGroup, ", and the device has ",
           groups, " of them; use fewer lanes or other widths");
  return best;
}

std::vector<std::unique_ptr<GreenContext>> partition_device(int device,
                                                            const std::vector<int>& widths) {
  CUdevice handle;
  NF_DRIVER_CALL(cuDeviceGet, &handle, device);
  const Split split(handle);
  const bool has_rest = split.remainder.type == CU_DEV_RESOURCE_TYPE_SM;
  const int rest = has_rest ? static_cast<int>(split.remainder.sm.smCount) : 0;
  const Deal deal = deal_groups(widths, static_cast<int>(split.groups.size()), rest);
  std::vector<std::unique_ptr<GreenContext>> contexts;
  auto next = split.groups.begin();
  for (size_t i = 0; i < widths.size(); ++i) {
    std::vector<CUdevResource> resources(next, next + deal.groups[i]);
    next += deal.groups[i];
    if (i == deal.with_remainder && rest > 0) resources.push_back(split.remainder);
    contexts.push_back(make_context(handle, std::move(resources)));
  }
  return contexts;
}

}  // namespace nanoflow::cuda
