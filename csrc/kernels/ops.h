#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <variant>

#include "core/tensor.h"
#include "kernels/region.h"

// One struct per operation. Dims: T rows (tokens), R requests, S sampled rows, H hidden, I
// intermediate, V vocabulary, Hq/Hkv query and KV heads, D head dim, P pages, N/K GEMM dims, E
// experts, A of them active for a row.
// Step tables (tokens, positions, page table, sampling parameters) are written before a step's
// first op and constant while it runs, so ops do not list them among their reads.

namespace nanoflow {

/// out = table[token] * scale, with scale rounded to table's dtype. A token t < 0 stands for
/// token_pool[-1 - t]: the last sample of that slot.
struct Embed {
  Tensor tokens;      // [T] int32
  Tensor token_pool;  // [slots] int32
  Tensor table;       // [V, H]
  Tensor out;         // [T, H]
  float scale = 1;

  static constexpr std::string_view kName = "embed";
  Regions reads() const;
  Regions writes() const;
};

/// out = round(x / rms(x)) * weight, or with unit_offset out = x / rms(x) * (1 + weight); with
/// `accumulate` what out held is added before the last rounding.
struct RmsNorm {
  Tensor x, out;  // [T, H]
  Tensor weight;  // [H]
  float eps;
  bool unit_offset = false;
  bool accumulate = false;  // out += instead of out =

  static constexpr std::string_view kName = "rms_norm";
  Regions reads() const;
  Regions writes() const;
};

/// out = x · weightᵀ + bias, summed in float and rounded once; with `accumulate` what out held is
/// added before the rounding. out has x's dtype, or is float32 without bias and accumulate.
struct Gemm {
  Tensor x;                 // [T, K]
  Tensor weight;            // [N, K], rows contiguous
  Tensor out;               // [T, N]
  Tensor bias = {};         // [N] of x's dtype, or none
  bool accumulate = false;  // out += instead of out =

  static constexpr std::string_view kName = "gemm";
  Regions reads() const;
  Regions writes() const;
};

/// What the gate of an MLP goes through.
enum class Activation {
  kSilu,      // x / (1 + e^-x)
  kGeluTanh,  // x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
};

std::string_view to_string(Activation activation);
/// "silu" or "gelu_tanh"; throws Error on anything else.
Activation parse_activation(std::string_view name);

/// out = silu(x · gateᵀ) * (x · upᵀ), all in float and rounded once; or with another activation
/// than SiLU.
struct GemmSiluMul {
  /// The weight holds this many rows of gate, then the rows of up that belong to them, and so on:
  /// gate row i is row i / kGroup * 2 kGroup + i % kGroup, its up row kGroup further.
  static constexpr int kGroup = 8;

  Tensor x;       // [T, K]
  Tensor weight;  // [2 I, K], rows contiguous; I is a multiple of kGroup
  Tensor out;     // [T, I] of x's dtype
  Activation activation = Activation::kSilu;

  static constexpr std::string_view kName = "gemm_silu_mul";
  Regions reads() const;
  Regions writes() const;
};

/// Rotates q and k in place (the two halves of a head are the pairs) and appends k and v to the
/// cache. With norms, each head of q and k is RmsNorm'ed before.
struct RopeAppend {
  Tensor qkv;               // [T, (Hq + 2 Hkv) * D]: q heads, k heads, v heads
  Tensor positions;         // [T] int32
  Tensor kv_slots;          // [T] int32: page * page_size + offset, or -1 for a padding row
  Tensor cos_sin;           // [max positions, D] float32: D/2 cosines, then D/2 sines
  Tensor k_cache, v_cache;  // [P, Hkv, page_size, D]
  Tensor q_norm = {};       // [D], or none
  Tensor k_norm = {};       // [D], if there is a q_norm
  float norm_eps = 0;
  bool norm_unit_offset = false;  // as in RmsNorm
  KvRows rows;

  static constexpr std::string_view kName = "rope_append";
  Regions reads() const;
  Regions writes() const;
};

/// Who attends to what in a step: device data, the same for all layers.
struct AttentionTables {
  Tensor segment_requests;  // [segments + 1] int32: first request of each segment of the step
  Tensor row_begin;         // [R] int32: first (padded) row of a request
  Tensor row_count;         // [R] int32: its rows in this step
  Tensor kv_len;            // [R] int32: its keys once this step's are appended
  Tensor page_indptr;       // [R + 1] int32: its pages in page_indices
  Tensor page_indices;      // [pages in use] int32
};

/// Turns the tables of the requests in segments [segment_begin, segment_end) into what the
/// Attention ops of all layers of this window on a lane of this width read. Only for backends that
/// ask for it (Backend::attention_work_bytes).
struct PlanAttention {
  AttentionTables tables;
  int segment_begin, segment_end;
  int num_heads, num_kv_heads, head_dim;
  int window = 0;  // of the Attention ops
  Tensor work;     // [words] int32, contents private to the backend
  KvRows rows;     // the rows these segments hold

  static constexpr std::string_view kName = "plan_attention";
  Regions reads() const;
  Regions writes() const;
};

/// Causal paged attention of the requests in segments [segment_begin, segment_end). Row i of a
/// request with n rows sees the first kv_len - n + 1 + i keys, or with a window the last `window`
/// of them.
struct Attention {
  Tensor q;                 // [T_all, Hq * D], a column slice of qkv; indexed by row_begin
  Tensor out;               // [T_all, Hq * D]
  Tensor k_cache, v_cache;  // [P, Hkv, page_size, D]
  AttentionTables tables;
  int segment_begin, segment_end;
  float scale;     // on q·k, usually D^-1/2
  int window = 0;  // 0: none
  Tensor work;     // PlanAttention's, or none
  KvRows rows;     // the rows these segments hold

  static constexpr std::string_view kName = "attention";
  Regions reads() const;
  Regions writes() const;
};

/// out[i] = x[index[i]]; an index < 0 gives a row of zeros.
struct GatherRows {
  Tensor x;      // [T, H]
  Tensor index;  // [S] int32
  Tensor out;    // [S, H]

  static constexpr std::string_view kName = "gather_rows";
  Regions reads() const;
  Regions writes() const;
};

/// How each sampled row is to be sampled: device data of a step.
struct SamplingTables {
  Tensor slots;          // [S] int32: token pool slot that takes the sample, -1 for a padding row
  Tensor temperature;    // [S] float32: 0 is greedy
  Tensor top_p;          // [S] float32: 1 keeps all
  Tensor min_p;          // [S] float32: 0 keeps all
  Tensor top_k;          // [S] int32: 0 keeps all
  Tensor seed;           // [S] uint64
  Tensor counter;        // [S] int32: how many tokens the request has sampled before
  Tensor banned_indptr;  // [S + 1] int32
  Tensor banned;         // [banned_indptr[S]] int32: tokens that must not be sampled
};

/// Samples a token per row from logits; the draw depends on (seed, counter) and the row alone.
/// Writes it to token_pool[slot] and to sampled (-1 for padding rows, kInvalidLogits where a row is
/// not finite).
struct Sample {
  static constexpr int kInvalidLogits = -2;

  Tensor logits;  // [S, V] float32
  SamplingTables tables;
  Tensor token_pool;  // [slots] int32
  Tensor sampled;     // [S] int32

  static constexpr std::string_view kName = "sample";
  Regions reads() const;
  Regions writes() const;
};

/// out[i] = mean + std * n(seed, i), where n is normal_sum of kernels/random.h over its deviation:
/// a value depends on the seed and its index alone, and all backends agree to the last bit. Where
/// out is a part of a larger matrix, of `stride` columns, index i is that of the value there.
struct FillNormal {
  Tensor out;  // of any shape, contiguous
  uint64_t seed;
  float mean, std;
  uint64_t first = 0;  // index of the first value
  int64_t stride = 0;  // from a row of out to the next; 0: its columns

  static constexpr std::string_view kName = "fill_normal";
  Regions reads() const;
  Regions writes() const;
};

/// The history of each sampled row and what its tokens cost: device data of a step.
struct PenaltyTables {
  Tensor slots;       // [S] int32: row of history
  Tensor length;      // [S] int32: tokens of its history; 0 for a row without penalties
  Tensor generated;   // [S] int32: how many of them, the last ones, have been sampled
  Tensor presence;    // [S] float32: off the logit of a token that was generated
  Tensor frequency;   // [S] float32: off the logit, for each time that it was
  Tensor repetition;  // [S] float32: divides the positive, multiplies the negative logit of a token
                      // that the history holds; before the other two
};

/// Applies penalties in place, once for each distinct token of a row's history.
struct Penalize {
  Tensor logits;   // [S, V] float32
  Tensor history;  // [slots, positions] int32
  PenaltyTables tables;

  static constexpr std::string_view kName = "penalize";
  Regions reads() const;
  Regions writes() const;
};

/// logits[i][token] += value for each entry of row i; a row names a token once at most.
struct AddBias {
  Tensor logits;  // [S, V] float32
  Tensor indptr;  // [S + 1] int32: entries of each row
  Tensor tokens;  // [entries] int32
  Tensor values;  // [entries] float32

  static constexpr std::string_view kName = "add_bias";
  Regions reads() const;
  Regions writes() const;
};

/// logits[i][t] = -inf where bit t % 32 of masks[rows[i]][t / 32] is 0.
struct MaskLogits {
  Tensor logits;     // [S, V] float32
  Tensor mask_rows;  // [S] int32: of masks; -1: all tokens stay
  Tensor masks;      // [M, ceil(V / 32)] int32

  static constexpr std::string_view kName = "mask_logits";
  Regions reads() const;
  Regions writes() const;
};

/// Appends what rows with penalties have sampled: history[slots[i]][length[i]] = sampled[i], if
/// there is room. The tokens before come from the batch, when a history begins.
struct RecordSamples {
  Tensor sampled;        // [S] int32
  Tensor slots, length;  // [S] int32, as in PenaltyTables
  Tensor history;        // [slots, positions] int32

  static constexpr std::string_view kName = "record_samples";
  Regions reads() const;
  Regions writes() const;
};

/// log-softmax of the logits, for one token and for the likeliest of each row that asks.
struct Logprobs {
  static constexpr int kMaxTop = 20;

  Tensor logits;    // [S, V] float32: as the model gave them
  Tensor sampled;   // [S] int32
  Tensor targets;   // [S] int32: the token; -1: the sampled one
  Tensor counts;    // [S] int32: tokens wanted beside that one; -1: nothing is written
  Tensor top;       // [S, kMaxTop] int32: the likeliest, the lower token first where they tie
  Tensor logprobs;  // [S, 1 + kMaxTop] float32: of the token, then of `top`
  Tensor ranks;     // [S] int32: tokens as likely as it or more, itself included

  static constexpr std::string_view kName = "logprobs";
  Regions reads() const;
  Regions writes() const;
};

/// Chooses the A likeliest experts of each row by softmax(logits), the likeliest first and the
/// lower one first where two tie. With `renormalize` their probabilities are divided by their sum.
/// A row that is not finite gets experts like any other, and weights of NaN.
struct RouteExperts {
  Tensor logits;   // [T, E] float32
  Tensor experts;  // [T, A] int32
  Tensor weights;  // [T, A] float32
  bool renormalize;

  static constexpr std::string_view kName = "route_experts";
  Regions reads() const;
  Regions writes() const;
};

/// Gives every pair of a row and one of its experts a place, in order of experts, then of rows.
struct SortByExpert {
  Tensor experts;  // [T, A] int32, those of a row distinct
  Tensor offsets;  // [E + 1] int32: the places of expert e begin at offsets[e], those of all end at
                   // offsets[E]
  Tensor sources;  // [T * A] int32: the row of each place
  Tensor places;   // [T, A] int32: the place of each pair

  static constexpr std::string_view kName = "sort_by_expert";
  Regions reads() const;
  Regions writes() const;
};

/// A Gemm for each expert: out = x · weight[e]ᵀ for the rows [offsets[e], offsets[e + 1]).
struct GroupedGemm {
  Tensor x;        // [S, K]
  Tensor weight;   // [E, N, K], rows contiguous
  Tensor offsets;  // [E + 1] int32, from 0 to S
  Tensor out;      // [S, N] of x's dtype

  static constexpr std::string_view kName = "grouped_gemm";
  Regions reads() const;
  Regions writes() const;
};

/// A GemmSiluMul for each expert.
struct GroupedGemmSiluMul {
  Tensor x;        // [S, K]
  Tensor weight;   // [E, 2 I, K], each expert's as in GemmSiluMul
  Tensor offsets;  // [E + 1] int32, from 0 to S
  Tensor out;      // [S, I] of x's dtype

  static constexpr std::string_view kName = "grouped_gemm_silu_mul";
  Regions reads() const;
  Regions writes() const;
};

/// out[t] = weights[t][0] * x[places[t][0]] + weights[t][1] * x[places[t][1]] + ..., added up in
/// this order in float, with `accumulate` what out held last, and rounded once.
struct CombineExperts {
  Tensor x;                 // [S, H]
  Tensor places;            // [T, A] int32
  Tensor weights;           // [T, A] float32
  Tensor out;               // [T, H] of x's dtype
  bool accumulate = false;  // out += instead of out =

  static constexpr std::string_view kName = "combine_experts";
  Regions reads() const;
  Regions writes() const;
};

/// x = the sum of all ranks' x, the same bits on every rank; then its norm, where the communicator
/// norms what it sums (Communicator::norms_sums).
struct AllReduce {
  Tensor x;                          // [T, N], contiguous
  std::optional<RmsNorm> norm = {};  // of x, into another tensor

  static constexpr std::string_view kName = "all_reduce";
  Regions reads() const;
  Regions writes() const;
};

/// out = the columns of all ranks' x side by side, without those that out has no room for.
struct AllGather {
  Tensor x;     // [T, C]: may be this rank's columns of out
  Tensor out;   // [T, N], N at most ranks * C
  Tensor work;  // for backends that ask for it (Communicator::gather_work_bytes), or none

  static constexpr std::string_view kName = "all_gather";
  Regions reads() const;
  Regions writes() const;
};

using Op = std::variant<Embed, RmsNorm, Gemm, GemmSiluMul, RopeAppend, PlanAttention, Attention,
                        GatherRows, Sample, FillNormal, Penalize, AddBias, MaskLogits,
                        RecordSamples, Logprobs, RouteExperts, SortByExpert, GroupedGemm,
                        GroupedGemmSiluMul, CombineExperts, AllReduce, AllGather>;

/// Whether all ranks take part in it together.
bool is_collective(const Op& op);
std::string_view name_of(const Op& op);
Regions reads_of(const Op& op);
Regions writes_of(const Op& op);

}  // namespace nanoflow
