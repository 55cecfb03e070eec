#pragma once

#include <map>
#include <string>
#include <vector>

namespace nanoflow {

/// A lane of a schedule: `width` is a share of the device (threads on a CPU, SMs on a GPU).
struct LaneSpec {
  std::string name;
  int width = 0;

  bool operator==(const LaneSpec&) const = default;
};

/// How one stage of every layer runs: cut at fractions of the step's rows, each part on its lane.
struct StageSpec {
  std::vector<double> split;       // ascending, inside (0, 1); empty is one nano-batch
  std::vector<std::string> lanes;  // one for all parts, or one for each; empty is the first lane
  std::string reduce = {};         // of o and mlp: the lane of their collectives
  std::vector<int> gather = {};    // of o: parts that gather instead of reducing, see Decoder
  bool in_turn = false;            // parts run one after the other, whatever lanes they are on

  bool operator==(const StageSpec&) const = default;
};

/// One entry of a schedule's order.
struct OrderItem {
  std::string stage;
  int part = 0;
  int layer_offset = 0;  // 1 for "@+1"
};

/// "qkv.1@+1" → {qkv, 1, 1}; throws Error on anything else.
OrderItem parse_order_item(const std::string& text);

/// Policy as data: which nano-batches each stage is cut into, which lanes run them, in what order
/// they are issued. Stages: qkv (norm, projection, rope, KV append; the embedding before layer 0),
/// attn, o, mlp, head.
///
/// `order` is one period, issued layer by layer: "o.0" is part 0 of stage o, "qkv.1@+1" is of the
/// next layer. Attention may be left out: it is issued right after the last qkv part it needs. An
/// empty order issues the stages in turn, part by part. Parts and lanes left out of `stages` run
/// unsplit on the first lane. The head runs after the layers, in a plan of its own: its lane may be
/// one of theirs, or another one as wide as the device.
///
/// Collectives of several ranks all run on one lane, so that ranks meet in one order: that which o
/// or mlp name as `reduce`, else the lane of stage o; those of the head on its own. A rank alone
/// has none.
///
/// What is limited by something that lanes share, as attention is by memory, may be told to run
/// in_turn: no two parts of such stages run at once, so that each has something else beside it.
struct Schedule {
  static constexpr const char* kStages[] = {"qkv", "attn", "o", "mlp", "head"};

  std::string id;
  std::vector<LaneSpec> lanes;
  std::map<std::string, StageSpec> stages;
  std::vector<std::string> order;

  bool operator==(const Schedule&) const = default;

  /// All split fractions, ascending: the boundaries of the segments a batch is dealt to.
  std::vector<double> cuts() const;
  /// The stage's entry, or its default.
  StageSpec stage(const std::string& name) const;
  int lane_index(const std::string& name) const;
  /// The index of the lane that runs a part of a stage.
  int lane_of(const std::string& stage_name, int part) const;
  /// The lanes that these stages and their collectives run on, in the order of `lanes`.
  std::vector<LaneSpec> lanes_of(const std::vector<std::string>& stage_names) const;
  /// Of the collectives of layers.
  int collective_lane() const;
  /// Whether some part of stage o gathers: weights and buffers have to be made for it.
  bool gathers() const { return !stage("o").gather.empty(); }
  /// Throws Error on an unknown stage or lane, fractions out of order, or an order that lacks or
  /// repeats a part.
  void check() const;

 private:
  void check_stages() const;
  void check_order() const;
  void check_collectives() const;
};

}  // namespace nanoflow
