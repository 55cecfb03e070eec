#include "pipeline/schedule.h"

#include <doctest/doctest.h>

#include "core/error.h"

using namespace nanoflow;

namespace {

Schedule pingpong() {
  return {.id = "pingpong",
          .lanes = {{"compute", 2}, {"memory", 1}},
          .stages = {{"qkv", {{0.5}, {"compute"}}},
                     {"attn", {{0.5}, {"memory"}}},
                     {"o", {{0.5}, {"compute"}}},
                     {"mlp", {{0.5}, {"compute"}}}},
          .order = {"o.0", "mlp.0", "qkv.0@+1", "o.1", "mlp.1", "qkv.1@+1"}};
}

std::string error_of(const Schedule& schedule) {
  try {
    schedule.check();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("order items name stage, part and layer") {
  const OrderItem item = parse_order_item("qkv.12@+1");
  CHECK(item.stage == "qkv");
  CHECK(item.part == 12);
  CHECK(item.layer_offset == 1);
  for (const char* bad : {"", "qkv", "qkv.", "qkv.x", "head.0", "mlp.0@+2", "ffn.0", "o.-1"}) {
    CHECK_THROWS_AS(parse_order_item(bad), Error);
  }
}

TEST_CASE("cuts are the union of all splits") {
  Schedule schedule = pingpong();
  schedule.stages["qkv"].split = {0.25, 0.5, 0.75};
  CHECK(schedule.cuts() == std::vector<double>{0.25, 0.5, 0.75});
  CHECK(schedule.lane_of("head", 0) == schedule.lane_index("compute"));  // the first lane
  CHECK(schedule.stage("head").split.empty());
}

TEST_CASE("parts of a stage may have lanes of their own") {
  Schedule schedule = pingpong();
  schedule.stages["mlp"].lanes = {"memory", "compute"};
  CHECK(error_of(schedule) == "");
  CHECK(schedule.lane_of("mlp", 0) == schedule.lane_index("memory"));
  CHECK(schedule.lane_of("mlp", 1) == schedule.lane_index("compute"));
  CHECK(schedule.lanes_of({"mlp"}).size() == 2);
  schedule.stages["mlp"].lanes.push_back("compute");
  CHECK(error_of(schedule) ==
        "schedule 'pingpong': stage mlp has 2 parts but 3 lanes; name one for all of them, or one "
        "for each");
}

TEST_CASE("a sound schedule passes") { CHECK(error_of(pingpong()) == ""); }

TEST_CASE("an inconsistent schedule says what is wrong") {
  Schedule s = pingpong();
  s.lanes.clear();
  CHECK(error_of(s) == "schedule 'pingpong' has no lanes");
  s = pingpong();
  s.lanes[1].width = 0;
  CHECK(error_of(s) == "schedule 'pingpong': lane 'memory' has width 0 but needs at least 1");
  s = pingpong();
  s.lanes.push_back({"compute", 1});
  CHECK(error_of(s) == "schedule 'pingpong' has two lanes named 'compute'");
  s = pingpong();
  s.stages["ffn"] = {};
  CHECK(error_of(s) ==
        "schedule 'pingpong' has an unknown stage 'ffn'; stages are qkv, attn, o, mlp and head");
  s = pingpong();
  s.stages["o"].lanes = {"network"};
  CHECK(error_of(s) == "schedule 'pingpong': stage o runs on lane 'network', which does not exist");
  s = pingpong();
  s.stages["o"].split = {0.5, 0.5};
  CHECK(error_of(s) ==
        "schedule 'pingpong': stage o is split at 0.5 after 0.5; fractions ascend inside (0, 1)");
  s = pingpong();
  s.stages["head"].split = {0.5};
  CHECK(error_of(s) == "schedule 'pingpong': stage head is not split");
  s = pingpong();
  s.order.push_back("o.1");
  CHECK(error_of(s) == "schedule 'pingpong': o.1 is ordered twice");
  s = pingpong();
  s.order.pop_back();
  CHECK(error_of(s) == "schedule 'pingpong': the order has 1 of the 2 parts of stage qkv");
  s = pingpong();
  s.order.push_back("attn.0");
  CHECK(error_of(s) == "schedule 'pingpong': the order has 1 of the 2 parts of stage attn");
  s = pingpong();
  s.order[0] = "o.2";
  CHECK(error_of(s) == "schedule 'pingpong': order item 'o.2' but stage o has 2 parts");
}
