#include "pipeline/schedule.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <set>

#include "core/error.h"

namespace nanoflow {
namespace {

constexpr std::string_view kNextLayer = "@+1";

bool is_stage(std::string_view name) {
  return std::find(std::begin(Schedule::kStages), std::end(Schedule::kStages), name) !=
         std::end(Schedule::kStages);
}

}  // namespace

OrderItem parse_order_item(const std::string& text) {
  OrderItem item;
  std::string_view rest = text;
  if (rest.ends_with(kNextLayer)) {
    item.layer_offset = 1;
    rest.remove_suffix(kNextLayer.size());
  }
  const size_t dot = rest.find('.');
  item.stage = std::string(rest.substr(0, dot));
  NF_CHECK(is_stage(item.stage) && item.stage != "head", "order item '", text,
           "' names no stage of a layer; use for example qkv.0, attn.1, o.0, mlp.1 or qkv.0@+1");
  const std::string_view number = dot == std::string_view::npos ? "" : rest.substr(dot + 1);
  const char* end = number.data() + number.size();
  const auto [parsed, code] = std::from_chars(number.data(), end, item.part);
  NF_CHECK(!number.empty() && code == std::errc() && parsed == end && item.part >= 0,
           "order item '", text, "' has no part number; use for example ", item.stage, ".0");
  return item;
}

std::vector<double> Schedule::cuts() const {
  std::set<double> cuts;
  for (const auto& [name, stage] : stages) cuts.insert(stage.split.begin(), stage.split.end());
  return {cuts.begin(), cuts.end()};
}

StageSpec Schedule::stage(const std::string& name) const {
  const auto entry = stages.find(name);
  return entry == stages.end() ? StageSpec{} : entry->second;
}

int Schedule::lane_index(const std::string& name) const {
  for (size_t i = 0; i < lanes.size(); ++i) {
    if (lanes[i].name == name) return static_cast<int>(i);
  }
  fail("schedule '", id, "' has no lane named '", name, "'");
}

int Schedule::lane_of(const std::string& stage_name, int part) const {
  const std::vector<std::string> names = stage(stage_name).lanes;
  if (names.empty()) return 0;
  return lane_index(names.size() == 1 ? names[0] : names.at(part));
}

std::vector<LaneSpec> Schedule::lanes_of(const std::vector<std::string>& stage_names) const {
  std::vector<LaneSpec> used;
  for (const LaneSpec& lane : lanes) {
    const bool runs = std::ranges::any_of(stage_names, [&](const auto& name) {
      const StageSpec spec = stage(name);
      if (spec.lanes.empty() && lane == lanes[0]) return true;
      return std::ranges::find(spec.lanes, lane.name) != spec.lanes.end() ||
             spec.reduce == lane.name;
    });
    if (runs) used.push_back(lane);
  }
  return used;
}

int Schedule::collective_lane() const {
  for (const auto& [name, stage] : stages) {
    if (!stage.reduce.empty()) return lane_index(stage.reduce);
  }
  return lane_of("o", 0);
}

void Schedule::check() const {
  NF_CHECK(!lanes.empty(), "schedule '", id, "' has no lanes");
  std::set<std::string> names;
  for (const LaneSpec& lane : lanes) {
    NF_CHECK(lane.width >= 1, "schedule '", id, "': lane '", lane.name, "' has width ", lane.width,
             " but needs at least 1");
    NF_CHECK(names.insert(lane.name).second, "schedule '", id, "' has two lanes named '", lane.name,
             "'");
  }
  check_stages();
  check_collectives();
  check_order();
}

void Schedule::check_stages() const {
  for (const auto& [name, stage] : stages) {
    NF_CHECK(is_stage(name), "schedule '", id, "' has an unknown stage '", name,
             "'; stages are qkv, attn, o, mlp and head");
    NF_CHECK(name != "head" || stage.split.empty(), "schedule '", id, "': stage head is not split");
    for (const std::string& lane : stage.lanes) {
      NF_CHECK(std::ranges::find(lanes, lane, &LaneSpec::name) != lanes.end(), "schedule '", id,
               "': stage ", name, " runs on lane '", lane, "', which does not exist");
    }
    const size_t parts = stage.split.size() + 1;
    NF_CHECK(stage.lanes.size() <= 1 || stage.lanes.size() == parts, "schedule '", id, "': stage ",
             name, " has ", parts, " parts but ", stage.lanes.size(),
             " lanes; name one for all of them, or one for each");
    double last = 0;
    for (double fraction : stage.split) {
      NF_CHECK(fraction > last && fraction < 1, "schedule '", id, "': stage ", name,
               " is split at ", fraction, " after ", last, "; fractions ascend inside (0, 1)");
      last = fraction;
    }
  }
}

void Schedule::check_collectives() const {
  std::string lane;
  for (const auto& [name, stage] : stages) {
    NF_CHECK(stage.gather.empty() || name == "o", "schedule '", id, "': stage ", name,
             " has parts that gather; only those of stage o do");
    const int parts = static_cast<int>(stage.split.size()) + 1;
    for (int part : stage.gather) {
      NF_CHECK(part >= 0 && part < parts, "schedule '", id, "': part ", part, " of stage ", name,
               " gathers, but there are ", parts, " parts");
    }
    if (stage.reduce.empty()) continue;
    NF_CHECK(name == "o" || name == "mlp", "schedule '", id, "': stage ", name,
             " has no collectives to run on lane '", stage.reduce, "'");
    NF_CHECK(lane.empty() || lane == stage.reduce, "schedule '", id,
             "': collectives run on the lanes '", lane, "' and '", stage.reduce,
             "', but all ranks have to run them in one order, on one lane");
    lane = stage.reduce;
  }
  if (!lane.empty()) lane_index(lane);  // throws
}

void Schedule::check_order() const {
  if (order.empty()) return;
  std::map<std::string, std::set<int>> seen;
  for (const std::string& text : order) {
    const OrderItem item = parse_order_item(text);
    const int parts = static_cast<int>(stage(item.stage).split.size()) + 1;
    NF_CHECK(item.part < parts, "schedule '", id, "': order item '", text, "' but stage ",
             item.stage, " has ", parts, " parts");
    NF_CHECK(seen[item.stage].insert(item.part).second, "schedule '", id, "': ", item.stage, ".",
             item.part, " is ordered twice");
  }
  for (const char* name : kStages) {
    if (std::string_view(name) == "head") continue;
    if (std::string_view(name) == "attn" && seen["attn"].empty()) continue;  // follows its qkv
    const size_t parts = stage(name).split.size() + 1;
    NF_CHECK(seen[name].size() == parts, "schedule '", id, "': the order has ", seen[name].size(),
             " of the ", parts, " parts of stage ", name);
  }
}

}  // namespace nanoflow
