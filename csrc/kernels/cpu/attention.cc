#include "kernels/cpu/attention.h"

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "core/match.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/math_loops.h"

// Causal paged attention: tiles of (request, rows, KV head) go to whichever thread is free. A key
// range is never split, so one long request keeps at most Hkv threads busy while it decodes.

namespace nanoflow::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The table entries of one request, checked.
struct Request {
  int64_t row_begin, rows, kv_len;
  const int32_t* pages;
};

Request request_of(const Attention& op, int64_t r) {
  const AttentionTables& tables = op.tables;
  const int32_t* indptr = tables.page_indptr.data<int32_t>();
  const Request request{.row_begin = tables.row_begin.data<int32_t>()[r],
                        .rows = tables.row_count.data<int32_t>()[r],
                        .kv_len = tables.kv_len.data<int32_t>()[r],
                        .pages = tables.page_indices.data<int32_t>() + indptr[r]};
  NF_CHECK(request.row_begin >= 0 && request.rows >= 0 &&
               request.row_begin + request.rows <= op.q.size(0),
           "attention: request ", r, " has rows [", request.row_begin, ", ",
           request.row_begin + request.rows, ") of ", op.q.size(0));
  const int64_t pages = ceil_div(request.kv_len, op.k_cache.size(2));
  NF_CHECK(request.rows <= request.kv_len && pages <= indptr[r + 1] - indptr[r] &&
               indptr[r + 1] <= tables.page_indices.size(0),
           "attention: request ", r, " has ", request.rows, " rows, ", request.kv_len, " keys and ",
           indptr[r + 1] - indptr[r], " pages of ", op.k_cache.size(2));
  for (int64_t i = 0; i < pages; ++i) {
    NF_CHECK(request.pages[i] >= 0 && request.pages[i] < op.k_cache.size(0), "attention: request ",
             r, " has page ", request.pages[i], " of ", op.k_cache.size(0));
  }
  return request;
}

/// Walks through the tiles of an op, numbered with the costliest first: a batch ends with its
/// prefills, a prefill with its longest rows.
class TileCursor {
 public:
  TileCursor(const Attention& op, int tile_rows) : op_(op), tile_rows_(tile_rows) {
    const int32_t* first = op.tables.segment_requests.data<int32_t>();
    begin_ = first[op.segment_begin];
    next_ = first[op.segment_end];
    NF_CHECK(begin_ >= 0 && begin_ <= next_ && next_ <= op.tables.kv_len.size(0),
             "attention: segments hold requests [", begin_, ", ", next_, ") of ",
             op.tables.kv_len.size(0));
  }

  /// Tile `index`, which never decreases from call to call; false past the last.
  bool seek(int64_t index, AttentionTile& tile) {
    while (index >= first_tile_ + tiles_) {
      if (next_ == begin_) return false;
      request_ = request_of(op_, --next_);
      first_tile_ += tiles_;
      tiles_ = ceil_div(request_.rows, tile_rows_) * op_.k_cache.size(1);
    }
    fill(index - first_tile_, tile);
    return true;
  }

 private:
  void fill(int64_t index, AttentionTile& tile) const {
    const int64_t kv_heads = op_.k_cache.size(1), D = op_.k_cache.size(3);
    const int64_t head = index % kv_heads;
    const int64_t group = op_.q.size(1) / D / kv_heads;
    const int64_t end = request_.rows - index / kv_heads * tile_rows_;
    const int64_t begin = std::max<int64_t>(0, end - tile_rows_);
    const int64_t row = request_.row_begin + begin;
    const auto item = static_cast<int64_t>(size_of(op_.q.dtype()));
    tile = {.q = op_.q.bytes() + (row * op_.q.stride(0) + head * group * D) * item,
            .out = op_.out.bytes() + (row * op_.out.stride(0) + head * group * D) * item,
            .q_stride = op_.q.stride(0),
            .out_stride = op_.out.stride(0),
            .rows = static_cast<int>(end - begin),
            .group = static_cast<int>(group),
            .head_dim = static_cast<int>(D),
            .first_limit = static_cast<int>(request_.kv_len - request_.rows + begin + 1),
            .window = op_.window > 0 ? op_.window : std::numeric_limits<int>::max(),
            .k = op_.k_cache.bytes() + head * op_.k_cache.stride(1) * item,
            .v = op_.v_cache.bytes() + head * op_.v_cache.stride(1) * item,
            .page = request_.pages,
            .k_page_stride = op_.k_cache.stride(0),
            .v_page_stride = op_.v_cache.stride(0),
            .k_token_stride = op_.k_cache.stride(2),
            .v_token_stride = op_.v_cache.stride(2),
            .page_size = static_cast<int>(op_.k_cache.size(2)),
            .scale = op_.scale};
  }

  const Attention& op_;
  const int64_t tile_rows_;
  int64_t begin_, next_;  // requests not walked through yet
  Request request_{};
  int64_t first_tile_ = 0, tiles_ = 0;  // of request_
};

void check(const Attention& op) {
  const DType dtype = op.q.dtype();
  ShapeMatcher match(Attention::kName);
  match("q", op.q, {"T", "Hq * D"}).contiguous_rows();
  match("out", op.out, {"T", "Hq * D"}).dtype(dtype).contiguous_rows();
  match("k_cache", op.k_cache, {"P", "Hkv", "page_size", "D"}).dtype(dtype).contiguous_rows();
  match("v_cache", op.v_cache, {"P", "Hkv", "page_size", "D"}).dtype(dtype).contiguous_rows();
  const int64_t group_width = match["Hkv"] * match["D"];
  NF_CHECK(group_width > 0 && match["Hq * D"] % group_width == 0, "attention: q is ", op.q,
           ", no multiple of ", match["Hkv"], " KV heads of ", match["D"]);
  const AttentionTables& tables = op.tables;
  const auto table = [&](std::string_view name, const Tensor& tensor, std::string_view size) {
    match(name, tensor, {size}).dtype(DType::kI32).contiguous_rows();
  };
  table("segment_requests", tables.segment_requests, "segments + 1");
  table("row_begin", tables.row_begin, "R");
  table("row_count", tables.row_count, "R");
  table("kv_len", tables.kv_len, "R");
  table("page_indptr", tables.page_indptr, "R + 1");
  table("page_indices", tables.page_indices, "pages in use");
  NF_CHECK(match["R + 1"] == match["R"] + 1, "attention: page_indptr is ", tables.page_indptr,
           " for ", match["R"], " requests");
  NF_CHECK(op.scale > 0, "attention: scale is ", op.scale, " but must be positive");
  NF_CHECK(op.window >= 0, "attention: window is ", op.window, "; 0 is none");
  NF_CHECK(0 <= op.segment_begin && op.segment_begin <= op.segment_end &&
               op.segment_end < match["segments + 1"],
           "attention: segments [", op.segment_begin, ", ", op.segment_end, ") of ",
           match["segments + 1"] - 1);
}

}  // namespace

void CpuKernels::run(const Attention& op, Lane& lane) {
  check(op);
  const AttentionLoops& loops = loop_set(isa_).of(op.q.dtype(), Attention::kName).attention;
  const auto D = static_cast<int>(op.k_cache.size(3));
  const auto group = static_cast<int>(op.q.size(1) / (op.k_cache.size(1) * D));
  const size_t scratch = loops.scratch_bytes(group, D);
  const int tile_rows = loops.tile_rows(group);
  cpu_lane(lane).enqueue(
      [op, &loops, scratch, tile_rows](const Worker& worker) {
        TileCursor cursor(op, tile_rows);
        std::byte* own = worker.scratch() + scratch * static_cast<size_t>(worker.index());
        AttentionTile tile, next;
        bool has_tile = cursor.seek(worker.claim(), tile);
        while (has_tile) {
          has_tile = cursor.seek(worker.claim(), next);
          loops.attend(tile, has_tile ? &next : nullptr, own);
          tile = next;
        }
      },
      scratch * static_cast<size_t>(lane.width()));
}

}  // namespace nanoflow::cpu
