#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "kernels/ops.h"
#include "model/weights.h"

namespace nanoflow {

/// The parts of a layer that a schedule places separately.
enum class Stage {
  kQkv,        // norm, projection, norms of heads, rope, KV append; the embedding before layer 0
  kAttention,  // paged attention
  kO,          // output projection, added to the residual
  kMlp,        // norm, gate and up with SiLU, down, added to the residual; or the same of experts
  kHead,       // last norm of the sampled rows, logits, sampling; once a step
};

inline constexpr int kNumStages = 5;
std::string_view to_string(Stage stage);

/// A nano-batch: padded rows [row_begin, row_end), which hold segments [segment_begin,
/// segment_end).
struct RowRange {
  int64_t row_begin, row_end;
  int segment_begin, segment_end;
};

/// Data of AddBias and of MaskLogits.
struct BiasTables {
  Tensor indptr;  // [S + 1] int32
  Tensor tokens;  // [entries] int32
  Tensor values;  // [entries] float32
};
struct MaskTables {
  Tensor rows;   // [S] int32
  Tensor masks;  // [requests, ceil(V / 32)] int32
};

/// What the experts of a step work in. A part of the step keeps to what its rows begin, and its
/// first segment.
struct ExpertBuffers {
  Tensor logits;   // [T, E] float32
  Tensor chosen;   // [T, A] int32
  Tensor weights;  // [T, A] float32
  Tensor places;   // [T, A] int32
  Tensor sources;  // [T * A] int32: rows, counted from the part's first
  Tensor offsets;  // [segments, E + 1] int32
  Tensor values;   // [T * A, H] in order of places: what experts read, then what they give
};

/// The fixed buffers a step works in. T and S are capacities.
struct DecoderBuffers {
  Tensor residual;                       // [T, H] what o and down add to
  Tensor normed;                         // [T, H] input of a projection
  Tensor qkv;                            // [T, (Hq + 2 Hkv) * D]
  Tensor attention_out;                  // [T, Hq * D]
  Tensor activated;                      // [T, I], with experts [T * A, I]
  ExpertBuffers experts;                 // in a model with experts
  Tensor gathered;                       // [T, all Hq * D] attention_out of all ranks; or none
  Tensor head_residual, head_normed;     // [S, H]
  Tensor logits;                         // [S, V] float32
  Tensor own_logits;                     // [S, V share] float32: where there are several ranks
  Tensor gather_work;                    // of AllGather; or none
  Tensor token_pool;                     // [slots] int32
  Tensor sampled;                        // [S] int32
  Tensor history;                        // [slots, positions] int32
  Tensor top, logprobs, ranks;           // of Logprobs
  Tensor cos_sin;                        // [positions, D] float32
  Tensor cos_sin_local;                  // of layers with a window; or none: as all others
  std::vector<Tensor> k_cache, v_cache;  // per layer: [P, Hkv, page_size, D]

  Tensor tokens, positions, kv_slots;  // [T] int32
  Tensor sample_rows;                  // [S] int32
  AttentionTables attention;
  Tensor attention_work;  // [distinct windows, segments, words] int32, by a part's first segment;
                          // or none
  SamplingTables sampling;
  PenaltyTables penalties;
  BiasTables bias;
  MaskTables masks;
  Tensor logprob_counts, logprob_targets;  // [S] int32
};

/// What the head of a step does beside sampling, for those of its requests that ask for it, in
/// vLLM's order: biases, penalties, masks.
struct HeadOptions {
  bool bias = false;
  bool penalties = false;
  bool masks = false;
  bool logprobs = false;
  bool logits_again = false;  // for logprobs: the ops before have changed the logits

  auto operator<=>(const HeadOptions&) const = default;
};

/// Emits the ops of one stage for one row range: the Llama family, by the traits of its spec.
///
/// With several ranks, all hold the same residual, and each adds to it what its heads and channels
/// give. The usual way is a product with the rank's columns of a weight, summed by an all-reduce;
/// rank 0's product alone includes what the residual held before. After a gather of the attention
/// outputs, o is instead a product with the rank's rows of the weight, for its columns of the
/// residual, and another gather (the two shapes of NanoFlow, OSDI'25, section 4.2). Where the
/// communicator norms what it sums, the norm that comes next is part of the all-reduce.
class Decoder {
 public:
  Decoder(std::shared_ptr<const Weights> weights, DecoderBuffers buffers);

  const ModelSpec& spec() const { return weights_->spec(); }
  const DecoderBuffers& buffers() const { return buffers_; }
  /// Ops in order of execution. The head samples the first `samples` rows of its tables.
  /// `gathers`: stage o, of several ranks, takes the way of gathers.
  std::vector<Op> emit(Stage stage, int layer, const RowRange& range, bool gathers = false) const;
  std::vector<Op> emit_head(int samples, const HeadOptions& options = {}) const;

 private:
  std::vector<Op> emit_qkv(int layer, const RowRange& range) const;
  std::vector<Op> emit_attention(int layer, const RowRange& range) const;
  std::vector<Op> emit_o(int layer, const RowRange& range) const;
  std::vector<Op> emit_gathered_o(int layer, const RowRange& range) const;
  std::vector<Op> emit_mlp(int layer, const RowRange& range) const;
  std::vector<Op> emit_experts(int layer, const RowRange& range) const;
  RmsNorm norm(const Tensor& x, const Tensor& weight, const Tensor& out) const;
  RmsNorm norm_and_add(const Tensor& x, const Tensor& weight, const Tensor& out) const;
  /// The weight of the norm that comes after the layer's MLP; none where the head's does.
  Tensor next_norm(int layer) const;
  /// Of all ranks, and normed with that weight where sums are.
  AllReduce sum_residual(const RowRange& range, const Tensor& next_norm) const;
  /// Adds x · weightᵀ of all ranks to the residual, by way of a norm if the spec has them there.
  void add_to_residual(std::vector<Op>& ops, const Tensor& x, const Tensor& weight,
                       const Tensor& post_norm, const Tensor& next_norm,
                       const RowRange& range) const;
  std::vector<Op> emit_logits(int samples) const;

  std::shared_ptr<const Weights> weights_;
  DecoderBuffers buffers_;
  bool norms_sums_;  // of layers: the residual's norm belongs to what changed it last
  std::vector<int> plan_of_layer_;  // index of its window among the distinct ones
  std::vector<int> plan_layers_;    // first layer of each
};

/// [positions, D] values for RopeAppend::cos_sin from [D/2] inverse frequencies.
std::vector<float> rope_table(const std::vector<float>& inv_freq, float attention_factor,
                              int positions);

}  // namespace nanoflow
