#include "pipeline/plan.h"

#include <iomanip>
#include <sstream>

namespace nanoflow {
namespace {

int64_t rows_of(const Op& op) {
  return std::visit(
      [](const auto& o) -> int64_t {
        if constexpr (requires { o.rows; }) {
          return o.rows.end - o.rows.begin;
        } else if constexpr (requires { o.out; }) {
          return o.out.size(0);
        } else if constexpr (requires { o.x; }) {
          return o.x.size(0);
        } else if constexpr (requires { o.logits; }) {
          return o.logits.size(0);
        } else if constexpr (requires { o.experts; }) {
          return o.experts.size(0);
        } else {
          return 0;  // works on tables alone
        }
      },
      op);
}

}  // namespace

std::string label_of(const NanoOp& op) {
  std::ostringstream label;
  if (op.label.stage == Stage::kHead) {
    label << "head";
  } else {
    label << "layers." << op.label.layer << "." << to_string(op.label.stage) << "."
          << op.label.part;
  }
  label << " " << name_of(op.op);
  return label.str();
}

std::ostream& operator<<(std::ostream& out, const Plan& plan) {
  out << "plan of schedule '" << plan.schedule_id << "': " << plan.ops.size() << " ops";
  if (!plan.key.segment_rows.empty()) {
    out << ", segments of";
    for (int rows : plan.key.segment_rows) out << " " << rows;
    out << " rows";
  }
  if (plan.key.samples > 0) out << ", " << plan.key.samples << " rows sampled";
  out << "\nlanes:";
  for (const LaneSpec& lane : plan.lanes) out << " " << lane.name << "=" << lane.width;
  out << "\n";
  for (const NanoOp& op : plan.ops) {
    out << std::setw(5) << op.id << "  " << std::left << std::setw(10) << plan.lanes[op.lane].name
        << std::setw(30) << label_of(op) << std::right << std::setw(6) << rows_of(op.op) << " rows";
    if (!op.deps.empty()) {
      out << "  after";
      for (OpId dep : op.deps) out << " " << dep;
    }
    out << "\n";
  }
  return out;
}

}  // namespace nanoflow
