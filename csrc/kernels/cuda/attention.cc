#include "kernels/cuda/attention.h"

#include <algorithm>
#include <bit>
#include <numbers>

#include "core/match.h"
#include "kernels/cuda/kernels.h"

namespace nanoflow::cuda {
namespace {

int window_of(int window) {
  NF_CHECK(window >= 0, "attention: window is ", window, "; 0 is none");
  return window > 0 ? std::min(window, kNoWindow) : kNoWindow;
}

int capacity_of(const AttentionTables& tables) {
  return static_cast<int>(tables.row_begin.size(0));
}

void check_tables(ShapeMatcher& match, const AttentionTables& tables) {
  match("row_begin", tables.row_begin, {"R"}).dtype(DType::kI32).contiguous_rows();
  match("row_count", tables.row_count, {"R"}).dtype(DType::kI32).contiguous_rows();
  match("kv_len", tables.kv_len, {"R"}).dtype(DType::kI32).contiguous_rows();
  match("page_indices", tables.page_indices, {"pages"}).dtype(DType::kI32).contiguous_rows();
}

void check_caches(const Attention& op) {
  const Tensor &k = op.k_cache, &v = op.v_cache;
  NF_CHECK(k.size(2) > 0 && std::has_single_bit(static_cast<uint64_t>(k.size(2))),
           "attention: the GPU needs a page size that is a power of two, not ", k.size(2));
  for (int dim = 0; dim < 3; ++dim) {
    NF_CHECK(k.stride(dim) == v.stride(dim) && k.stride(dim) % 8 == 0, "attention: dimension ", dim,
             " of k_cache and v_cache has strides ", k.stride(dim), " and ", v.stride(dim),
             "; the GPU needs equal multiples of 8");
  }
}

/// Bulk copies read the queries, rows of 16-bit floats.
void check_queries(const Tensor& q) {
  NF_CHECK(
      reinterpret_cast<uintptr_t>(q.bytes()) % 16 == 0 && (q.size(0) <= 1 || q.stride(0) % 8 == 0),
      "attention: the GPU needs rows of q that begin at multiples of 16 bytes; ", q, " lies at ",
      static_cast<const void*>(q.bytes()));
}

}  // namespace

size_t attention_work_bytes(int requests, int rows, int group, int kv_heads, int ctas) {
  const size_t tiles = 2 * (static_cast<size_t>(rows) * group / kTileRows + requests);
  return AttentionWork::of(requests, kv_heads, ctas).tiles +
         AttentionWork::align(tiles * sizeof(AttentionTile));
}

size_t attention_partial_bytes(int ctas, int kv_heads, int head_dim) {
  if (head_dim > kMaxStreamDim) return 0;
  const auto chunks =
      static_cast<size_t>(AttentionWork::owned_chunks(ctas, kv_heads)) * (1 + kSharedChunks);
  return 2 * chunks * kv_heads * kStreamHeads * (head_dim + 2) * sizeof(float);
}

AttentionLauncher attention_launcher(int head_dim) {
  switch (head_dim) {
    case 64:
      return launch_attention_d64;
    case 128:
      return launch_attention_d128;
    case 256:
      return launch_attention_d256;
    default:
      return nullptr;
  }
}

std::string head_dim_problem(int head_dim) {
  if (attention_launcher(head_dim) != nullptr) return "";
  return "head_dim " + std::to_string(head_dim) + " has no GPU kernels; 64, 128 and 256 have";
}

void CudaKernels::run(const PlanAttention& op, Lane& lane) {
  CudaLane& own = cuda_lane(lane);
  ShapeMatcher match("plan_attention");
  check_tables(match, op.tables);
  match("work", op.work, {"words"}).dtype(DType::kI32).contiguous_rows();
  NF_CHECK(op.num_kv_heads > 0 && op.num_heads % op.num_kv_heads == 0,
           "plan_attention: ", op.num_heads, " query heads are no multiple of ", op.num_kv_heads,
           " KV heads");
  NF_CHECK(own.width() <= kMaxAttentionCtas, "plan_attention: a lane of ", own.width(),
           " SMs is wider than ", kMaxAttentionCtas);
  const int requests = capacity_of(op.tables), group = op.num_heads / op.num_kv_heads;
  const int rows = static_cast<int>(op.rows.end - op.rows.begin);
  const size_t least = attention_work_bytes(requests, rows, group, op.num_kv_heads, own.width());
  NF_CHECK(op.work.span_bytes() >= least, "plan_attention: work holds ", op.work.span_bytes(),
           " bytes, ", requests, " requests of ", rows, " rows on ", own.width(), " SMs need ",
           least);
  launch_attention_plan({.segment_requests = op.tables.segment_requests.data<int>(),
                         .row_begin = op.tables.row_begin.data<int>(),
                         .row_count = op.tables.row_count.data<int>(),
                         .kv_len = op.tables.kv_len.data<int>(),
                         .page_indptr = op.tables.page_indptr.data<int>(),
                         .segment_begin = op.segment_begin,
                         .segment_end = op.segment_end,
                         .requests = requests,
                         .group = group,
                         .kv_heads = op.num_kv_heads,
                         .window = window_of(op.window),
                         .ctas = own.width(),
                         .tiles_all = batch_invariant_ || op.head_dim > kMaxStreamDim,
                         .work = op.work.bytes(),
                         .stream = own.stream()});
}

void CudaKernels::run(const Attention& op, Lane& lane) {
  CudaLane& own = cuda_lane(lane);
  ShapeMatcher match("attention");
  check_tables(match, op.tables);
  match("q", op.q, {"T", "Hq*D"}).contiguous_rows();
  match("out", op.out, {"T", "Hq*D"}).dtype(op.q.dtype()).contiguous_rows();
  match("k_cache", op.k_cache, {"P", "Hkv", "page_size", "D"})
      .dtype(op.q.dtype())
      .contiguous_rows();
  match("v_cache", op.v_cache, {"P", "Hkv", "page_size", "D"})
      .dtype(op.q.dtype())
      .contiguous_rows();
  check_caches(op);
  check_queries(op.q);
  NF_CHECK(op.work, "attention: the GPU needs the work list of plan_attention");
  const int head_dim = static_cast<int>(match["D"]), kv_heads = static_cast<int>(match["Hkv"]);
  const AttentionLauncher launch = attention_launcher(head_dim);
  NF_CHECK(launch != nullptr, "attention: ", head_dim_problem(head_dim));
  NF_CHECK(op.q.dtype() == DType::kBF16 || op.q.dtype() == DType::kF16, "attention: ", op.q.dtype(),
           " has no GPU kernel; bfloat16 and float16 have");
  NF_CHECK(match["Hq*D"] % (head_dim * kv_heads) == 0, "attention: q ", op.q,
           " holds no multiple of ", kv_heads, " heads of ", head_dim);
  NF_CHECK(attention_partial_bytes(own.width(), kv_heads, head_dim) <= CudaLane::kWorkspaceBytes,
           "attention: a lane of ", own.width(), " SMs has too little workspace");
  const AttentionArguments arguments{
      .q = op.q.bytes(),
      .out = op.out.bytes(),
      .k_cache = op.k_cache.bytes(),
      .v_cache = op.v_cache.bytes(),
      .page_indices = op.tables.page_indices.data<int>(),
      .q_stride = op.q.stride(0),
      .out_stride = op.out.stride(0),
      .page_stride = op.k_cache.stride(0),
      .head_stride = op.k_cache.stride(1),
      .key_stride = op.k_cache.stride(2),
      .group = static_cast<int>(match["Hq*D"]) / (head_dim * kv_heads),
      .kv_heads = kv_heads,
      .page_shift = std::countr_zero(static_cast<uint64_t>(op.k_cache.size(2))),
      .pages = static_cast<int>(op.k_cache.size(0)),
      .window = window_of(op.window),
      .scale_log2 = op.scale * std::numbers::log2e_v<float>,
      .work = op.work.bytes(),
      .partials = reinterpret_cast<float*>(own.workspace()),
      .ctas = own.width(),
      .stream = own.stream()};
  launch(arguments, op.q.dtype());
}

}  // namespace nanoflow::cuda
