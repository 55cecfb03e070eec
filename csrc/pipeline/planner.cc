#include "pipeline/planner.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "core/error.h"

namespace nanoflow {
namespace {

using PartKey = std::tuple<int, int, int>;  // stage, layer, part

/// The parts of one stage as row ranges of the padded step.
std::vector<RowRange> parts_of(const StageSpec& stage, const std::vector<double>& cuts,
                               const std::vector<int>& segment_rows) {
  std::vector<int> bounds{0};
  for (double fraction : stage.split) {
    bounds.push_back(
        1 + static_cast<int>(std::find(cuts.begin(), cuts.end(), fraction) - cuts.begin()));
  }
  bounds.push_back(static_cast<int>(segment_rows.size()));
  std::vector<RowRange> parts;
  int64_t row = 0;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    RowRange part{
        .row_begin = row, .row_end = row, .segment_begin = bounds[i], .segment_end = bounds[i + 1]};
    for (int s = bounds[i]; s < bounds[i + 1]; ++s) part.row_end += segment_rows[s];
    row = part.row_end;
    parts.push_back(part);
  }
  return parts;
}

/// Regions still of interest to later ops.
class AccessLog {
 public:
  /// Adds to `deps` the ops that conflict with op's accesses, then logs them.
  void add(OpId id, const Regions& reads, const Regions& writes, std::vector<OpId>& deps) {
    for (const Region& read : reads) {
      for (const Access& access : log_[read.space]) {
        if (access.is_write && access.region.overlaps(read)) deps.push_back(access.id);
      }
    }
    for (const Region& write : writes) {
      std::vector<Access>& log = log_[write.space];
      for (const Access& access : log) {
        if (access.region.overlaps(write)) deps.push_back(access.id);
      }
      std::erase_if(log, [&](const Access& a) { return write.contains(a.region); });
    }
    for (const Region& write : writes) log_[write.space].push_back({write, id, true});
    for (const Region& read : reads) log_[read.space].push_back({read, id, false});
    std::sort(deps.begin(), deps.end());
    deps.erase(std::unique(deps.begin(), deps.end()), deps.end());
  }

 private:
  struct Access {
    Region region;
    OpId id;
    bool is_write;
  };
  std::map<int64_t, std::vector<Access>> log_;  // by space
};

/// The stretch of memory that a program writes to; weights and other constants lie outside.
Region written_memory(const std::vector<EmittedOp>& program) {
  Region span{.space = Region::kMemory, .begin = UINT64_MAX, .end = 0};
  for (const EmittedOp& emitted : program) {
    for (const Region& write : writes_of(emitted.op)) {
      if (write.space != Region::kMemory) continue;
      span.begin = std::min(span.begin, write.begin);
      span.end = std::max(span.end, write.end);
    }
  }
  return span;
}

std::vector<LaneSpec> lanes_of(const Schedule& schedule, const PlanKey& key) {
  std::vector<std::string> stages;
  for (const char* stage : Schedule::kStages) {
    const bool is_head = std::string_view(stage) == "head";
    if (is_head ? key.samples > 0 : !key.segment_rows.empty()) stages.emplace_back(stage);
  }
  return schedule.lanes_of(stages);
}

/// The parts of all layers in the order the schedule issues them.
std::vector<PartKey> issue_order(const Schedule& schedule, int num_layers,
                                 const std::map<Stage, std::vector<RowRange>>& parts) {
  constexpr Stage kLayerStages[] = {Stage::kQkv, Stage::kAttention, Stage::kO, Stage::kMlp};
  std::vector<OrderItem> period;
  for (const std::string& text : schedule.order) period.push_back(parse_order_item(text));
  if (period.empty()) {
    for (Stage stage : kLayerStages) {
      for (int part = 0; part < static_cast<int>(parts.at(stage).size()); ++part) {
        period.push_back({.stage = std::string(to_string(stage)), .part = part, .layer_offset = 0});
      }
    }
  }
  const auto stage_of = [&](const OrderItem& item) {
    return *std::find_if(std::begin(kLayerStages), std::end(kLayerStages),
                         [&](Stage s) { return to_string(s) == item.stage; });
  };
  const bool attention_follows = std::none_of(
      period.begin(), period.end(), [](const OrderItem& item) { return item.stage == "attn"; });

  std::vector<PartKey> issue;
  std::set<std::pair<int, int>> covered;  // (layer, segment) whose qkv has been issued
  std::set<PartKey> issued;
  const auto add = [&](const OrderItem& item, int layer) {
    const Stage stage = stage_of(item);
    issue.emplace_back(static_cast<int>(stage), layer, item.part);
    if (stage != Stage::kQkv || !attention_follows) return;
    const RowRange& qkv = parts.at(Stage::kQkv)[item.part];
    for (int s = qkv.segment_begin; s < qkv.segment_end; ++s) covered.insert({layer, s});
    const std::vector<RowRange>& ranges = parts.at(Stage::kAttention);
    for (int part = 0; part < static_cast<int>(ranges.size()); ++part) {
      bool ready = true;
      for (int s = ranges[part].segment_begin; s < ranges[part].segment_end; ++s) {
        ready = ready && covered.contains({layer, s});
      }
      const PartKey key{static_cast<int>(Stage::kAttention), layer, part};
      if (ready && issued.insert(key).second) issue.push_back(key);
    }
  };
  for (const OrderItem& item : period) {
    if (item.layer_offset == 1) add(item, 0);  // what the period of layer -1 would have issued
  }
  for (int layer = 0; layer < num_layers; ++layer) {
    for (const OrderItem& item : period) {
      if (layer + item.layer_offset < num_layers) add(item, layer + item.layer_offset);
    }
  }
  return issue;
}

}  // namespace

std::vector<std::vector<OpId>> find_hazards(const std::vector<EmittedOp>& program) {
  std::vector<std::vector<OpId>> hazards(program.size());
  const Region written = written_memory(program);
  AccessLog log;
  for (size_t i = 0; i < program.size(); ++i) {
    Regions reads = reads_of(program[i].op);
    std::erase_if(reads, [&](const Region& read) {
      return read.space == Region::kMemory && !read.overlaps(written);
    });
    log.add(static_cast<OpId>(i), reads, writes_of(program[i].op), hazards[i]);
  }
  return hazards;
}

Plan place(const std::vector<EmittedOp>& program, const std::vector<OpId>& issue,
           const std::vector<LaneSpec>& lanes) {
  NF_CHECK(issue.size() == program.size(), "the order has ", issue.size(), " of ", program.size(),
           " ops");
  const std::vector<std::vector<OpId>> hazards = find_hazards(program);
  std::vector<OpId> position(program.size(), -1);  // program index → id in the plan
  // seen[lane][other]: the last op of `other` that ops issued on `lane` from here on run after.
  const size_t num_lanes = lanes.size();
  std::vector<std::vector<OpId>> seen(num_lanes, std::vector<OpId>(num_lanes, -1));
  std::vector<std::vector<OpId>> seen_after(
      program.size());  // by id: its lane's row once it has run
  Plan plan{.schedule_id = {}, .key = {}, .lanes = lanes, .ops = {}};
  plan.ops.reserve(program.size());
  OpId last_in_turn = -1;
  for (size_t i = 0; i < issue.size(); ++i) {
    const EmittedOp& emitted = program.at(static_cast<size_t>(issue[i]));
    NanoOp op{.op = emitted.op,
              .label = emitted.label,
              .name = {},
              .id = static_cast<OpId>(i),
              .lane = emitted.lane,
              .deps = {},
              .is_awaited = false};
    op.name = label_of(op);
    std::vector<OpId> latest(num_lanes, -1);
    for (OpId hazard : hazards[issue[i]]) {
      const OpId dep = position[hazard];
      NF_CHECK(dep >= 0, label_of(op), " is issued before ", name_of(program[hazard].op),
               " of layer ", program[hazard].label.layer, " (stage ",
               to_string(program[hazard].label.stage), "), on which it depends");
      OpId& last = latest[plan.ops[dep].lane];
      last = std::max(last, dep);
    }
    if (emitted.in_turn) {
      if (last_in_turn >= 0) {
        OpId& last = latest[plan.ops[last_in_turn].lane];
        last = std::max(last, last_in_turn);
      }
      last_in_turn = op.id;
    }
    std::vector<OpId>& mine = seen[op.lane];
    for (size_t lane = 0; lane < num_lanes; ++lane) {
      if (static_cast<int>(lane) == op.lane || latest[lane] <= mine[lane]) continue;
      op.deps.push_back(latest[lane]);
      plan.ops[latest[lane]].is_awaited = true;
      for (size_t other = 0; other < num_lanes; ++other) {
        mine[other] = std::max(mine[other], seen_after[latest[lane]][other]);
      }
    }
    mine[op.lane] = op.id;
    seen_after[op.id] = mine;
    position[issue[i]] = op.id;
    plan.ops.push_back(std::move(op));
  }
  return plan;
}

std::vector<EmittedOp> emit_program(const Decoder& decoder, const Schedule& schedule,
                                    const PlanKey& key) {
  const std::vector<double> cuts = schedule.cuts();
  const bool has_layers = !key.segment_rows.empty();
  NF_CHECK(!has_layers || key.segment_rows.size() == cuts.size() + 1, "schedule '", schedule.id,
           "' has ", cuts.size() + 1, " segments, not ", key.segment_rows.size());
  std::vector<EmittedOp> program;
  const int collectives = schedule.collective_lane();
  const auto append = [&](std::vector<Op> ops, OpLabel label, int lane, bool in_turn = false) {
    for (Op& op : ops) {
      const bool is_apart = is_collective(op) && label.stage != Stage::kHead;
      const int own = is_apart ? collectives : lane;
      program.push_back({std::move(op), label, own, in_turn});
    }
  };
  for (int layer = 0; has_layers && layer < decoder.spec().num_layers; ++layer) {
    for (Stage stage : {Stage::kQkv, Stage::kAttention, Stage::kO, Stage::kMlp}) {
      const StageSpec spec = schedule.stage(std::string(to_string(stage)));
      const std::vector<RowRange> parts = parts_of(spec, cuts, key.segment_rows);
      for (int part = 0; part < static_cast<int>(parts.size()); ++part) {
        if (parts[part].row_begin == parts[part].row_end) continue;
        const bool gathers = std::ranges::find(spec.gather, part) != spec.gather.end();
        append(decoder.emit(stage, layer, parts[part], gathers),
               {.stage = stage, .layer = layer, .part = part},
               schedule.lane_of(std::string(to_string(stage)), part), spec.in_turn);
      }
    }
  }
  append(decoder.emit_head(key.samples, key.options),
         {.stage = Stage::kHead, .layer = 0, .part = 0}, schedule.lane_of("head", 0));
  return program;
}

Plan build_plan(const Decoder& decoder, const Schedule& schedule, const PlanKey& key) {
  schedule.check();
  std::vector<EmittedOp> program = emit_program(decoder, schedule, key);
  const std::vector<LaneSpec> lanes = lanes_of(schedule, key);
  for (EmittedOp& op : program) {
    const LaneSpec& lane = schedule.lanes[op.lane];
    op.lane = static_cast<int>(std::find(lanes.begin(), lanes.end(), lane) - lanes.begin());
  }
  std::map<PartKey, std::vector<OpId>> ids;
  for (size_t i = 0; i < program.size(); ++i) {
    const OpLabel& label = program[i].label;
    ids[{static_cast<int>(label.stage), label.layer, label.part}].push_back(static_cast<OpId>(i));
  }
  std::vector<PartKey> order;
  if (!key.segment_rows.empty()) {
    std::map<Stage, std::vector<RowRange>> parts;
    const std::vector<double> cuts = schedule.cuts();
    for (Stage stage : {Stage::kQkv, Stage::kAttention, Stage::kO, Stage::kMlp}) {
      parts[stage] =
          parts_of(schedule.stage(std::string(to_string(stage))), cuts, key.segment_rows);
    }
    order = issue_order(schedule, decoder.spec().num_layers, parts);
  }
  order.emplace_back(static_cast<int>(Stage::kHead), 0, 0);
  std::vector<OpId> issue;
  for (const PartKey& part : order) {
    const auto entry = ids.find(part);
    if (entry == ids.end()) continue;  // no rows
    issue.insert(issue.end(), entry->second.begin(), entry->second.end());
  }
  Plan plan = place(program, issue, lanes);
  plan.schedule_id = schedule.id;
  plan.key = key;
  return plan;
}

}  // namespace nanoflow
