#include "pipeline/validate.h"

#include <algorithm>
#include <set>
#include <sstream>
#include <tuple>
#include <utility>

namespace nanoflow {
namespace {

struct Access {
  Region region;
  OpId op;
  bool is_write;
};

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

void check_structure(const Plan& plan, int device_width, std::vector<std::string>& findings) {
  int width = 0;
  for (const LaneSpec& lane : plan.lanes) {
    if (lane.width < 1) findings.push_back(text("lane ", lane.name, " has width ", lane.width));
    width += lane.width;
  }
  // A device narrower than its number of lanes shares itself between lanes of width 1.
  const int available = std::max(device_width, static_cast<int>(plan.lanes.size()));
  if (width > available) {
    findings.push_back(text("lane widths add up to ", width, " but the device has ", available));
  }
  for (size_t i = 0; i < plan.ops.size(); ++i) {
    const NanoOp& op = plan.ops[i];
    if (op.id != static_cast<OpId>(i)) findings.push_back(text("op ", i, " has id ", op.id));
    if (op.lane < 0 || op.lane >= static_cast<int>(plan.lanes.size())) {
      findings.push_back(text("op ", i, " is on lane ", op.lane, ", which does not exist"));
    }
    for (OpId dep : op.deps) {
      if (dep < 0 || dep >= static_cast<OpId>(i)) {
        findings.push_back(
            text("op ", i, " waits for op ", dep, ", which is not issued before it"));
      } else if (!plan.ops[dep].is_awaited) {
        findings.push_back(text("op ", i, " waits for op ", dep, ", which records no event"));
      }
    }
  }
}

/// before[op][lane]: the last op of the lane that has certainly finished when op starts.
std::vector<std::vector<OpId>> order_of(const Plan& plan) {
  const size_t lanes = plan.lanes.size();
  std::vector<std::vector<OpId>> before(plan.ops.size(), std::vector<OpId>(lanes, -1));
  std::vector<OpId> last_on_lane(lanes, -1);
  const auto join = [&](std::vector<OpId>& clock, OpId finished) {
    for (size_t lane = 0; lane < lanes; ++lane) {
      clock[lane] = std::max(clock[lane], before[finished][lane]);
    }
    clock[plan.ops[finished].lane] = std::max(clock[plan.ops[finished].lane], finished);
  };
  for (const NanoOp& op : plan.ops) {
    if (last_on_lane[op.lane] >= 0) join(before[op.id], last_on_lane[op.lane]);
    for (OpId dep : op.deps) join(before[op.id], dep);
    last_on_lane[op.lane] = op.id;
  }
  return before;
}

std::vector<Access> accesses_of(const Plan& plan) {
  std::vector<Access> accesses;
  for (const NanoOp& op : plan.ops) {
    for (const Region& region : reads_of(op.op)) accesses.push_back({region, op.id, false});
    for (const Region& region : writes_of(op.op)) accesses.push_back({region, op.id, true});
  }
  std::sort(accesses.begin(), accesses.end(), [](const Access& a, const Access& b) {
    return std::tie(a.region.space, a.region.begin) < std::tie(b.region.space, b.region.begin);
  });
  return accesses;
}

}  // namespace

std::vector<std::string> validate(const Plan& plan, int device_width) {
  std::vector<std::string> findings;
  check_structure(plan, device_width, findings);
  if (!findings.empty()) return findings;
  const std::vector<std::vector<OpId>> before = order_of(plan);
  const std::vector<Access> accesses = accesses_of(plan);
  std::set<std::pair<OpId, OpId>> reported;
  for (size_t i = 0; i < accesses.size(); ++i) {
    for (size_t j = i + 1; j < accesses.size(); ++j) {
      const Access &a = accesses[i], &b = accesses[j];
      if (!a.region.overlaps(b.region)) {
        if (a.region.space != b.region.space || b.region.begin >= a.region.end) break;
        continue;  // an empty region
      }
      if (a.op == b.op || (!a.is_write && !b.is_write)) continue;
      const auto [first, second] = std::minmax(a.op, b.op);
      if (before[second][plan.ops[first].lane] >= first) continue;
      if (!reported.insert({first, second}).second) continue;
      findings.push_back(text("op ", first, " (", label_of(plan.ops[first]), ") and op ", second,
                              " (", label_of(plan.ops[second]),
                              ") touch the same data and nothing orders them"));
    }
  }
  return findings;
}

}  // namespace nanoflow
