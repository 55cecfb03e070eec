#include "kernels/cpu/pointwise.h"

#include <cstring>

#include "core/error.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/math_loops.h"
#include "kernels/shapes.h"

// Embed, norms, rotation with KV append, and gathers: threads share the rows.

namespace nanoflow::cpu {
namespace {

std::byte* row_of(const Tensor& tensor, int64_t row) {
  return tensor.bytes() + row * tensor.stride(0) * static_cast<int64_t>(size_of(tensor.dtype()));
}

size_t row_bytes(const Tensor& tensor) {
  return static_cast<size_t>(tensor.size(1)) * size_of(tensor.dtype());
}

/// Queues row(t) for all t < rows.
template <typename Fn>
void for_rows(Lane& lane, int64_t rows, const Fn& row) {
  if (rows == 0) return;
  cpu_lane(lane).enqueue([rows, row](const Worker& worker) {
    const auto [begin, end] = worker.share(rows);
    for (int64_t t = begin; t < end; ++t) row(t);
  });
}

/// The token of a row: itself, or what its slot of the pool holds.
int64_t token_of(const Embed& op, int64_t row) {
  const int32_t token = op.tokens.data<int32_t>()[row];
  if (token >= 0) return token;
  const int64_t slot = -1 - static_cast<int64_t>(token);
  NF_CHECK(slot < op.token_pool.size(0), "embed: token ", token, " of row ", row,
           " stands for slot ", slot, " of a pool of ", op.token_pool.size(0));
  return op.token_pool.data<int32_t>()[slot];
}

/// Copies the KV heads of a row into a page.
void append(const Tensor& cache, int32_t slot, const std::byte* heads) {
  const auto item = static_cast<int64_t>(size_of(cache.dtype()));
  const int64_t page_size = cache.size(2);
  const int64_t D = cache.size(3);
  std::byte* to = cache.bytes() +
                  (slot / page_size * cache.stride(0) + slot % page_size * cache.stride(2)) * item;
  for (int64_t head = 0; head < cache.size(1); ++head) {
    std::memcpy(to + head * cache.stride(1) * item, heads + head * D * item,
                static_cast<size_t>(D * item));
  }
}

/// Norms heads [begin, end) of a row in place.
void norm_heads(const RopeAppend& op, const PointwiseLoops& loops, std::byte* heads, int64_t begin,
                int64_t end, const Tensor& weight) {
  const NormStyle style{op.norm_eps, op.norm_unit_offset, false};
  const int64_t D = weight.size(0);
  const int64_t head_bytes = D * static_cast<int64_t>(size_of(weight.dtype()));
  for (int64_t i = begin; i < end; ++i) {
    std::byte* head = heads + i * head_bytes;
    loops.rms_norm(head, weight.bytes(), head, D, style);
  }
}

void rope_append_row(const RopeAppend& op, const PointwiseLoops& loops, int64_t row) {
  const int32_t slot = op.kv_slots.data<int32_t>()[row];
  if (slot < 0) return;
  const int32_t position = op.positions.data<int32_t>()[row];
  NF_CHECK(position >= 0 && position < op.cos_sin.size(0), "rope_append: row ", row,
           " is at position ", position, " but the table has ", op.cos_sin.size(0));
  const int64_t slots = op.k_cache.size(0) * op.k_cache.size(2);
  NF_CHECK(slot < slots, "rope_append: row ", row, " has KV slot ", slot, " of ", slots);
  const int64_t D = op.k_cache.size(3);
  const int64_t head_bytes = D * static_cast<int64_t>(size_of(op.qkv.dtype()));
  const int64_t kv_heads = op.k_cache.size(1);
  const int64_t rotated = op.qkv.size(1) / D - kv_heads;  // q and k heads
  std::byte* heads = row_of(op.qkv, row);
  const auto* cos_sin = reinterpret_cast<const float*>(row_of(op.cos_sin, position));
  if (op.q_norm) {
    norm_heads(op, loops, heads, 0, rotated - kv_heads, op.q_norm);
    norm_heads(op, loops, heads, rotated - kv_heads, rotated, op.k_norm);
  }
  loops.rotate(heads, rotated, cos_sin, D / 2);
  append(op.k_cache, slot, heads + (rotated - kv_heads) * head_bytes);
  append(op.v_cache, slot, heads + rotated * head_bytes);
}

}  // namespace

void norm_row(const RmsNorm& op, const PointwiseLoops& loops, int64_t row) {
  loops.rms_norm(row_of(op.x, row), op.weight.bytes(), row_of(op.out, row), op.x.size(1),
                 {op.eps, op.unit_offset, op.accumulate});
}

void norm_rows(const RmsNorm& op, const PointwiseLoops& loops, Lane& lane) {
  for_rows(lane, op.x.size(0), [op, &loops](int64_t row) { norm_row(op, loops, row); });
}

void CpuKernels::run(const Embed& op, Lane& lane) {
  const PointwiseLoops& loops = loop_set(isa_).of(op.table.dtype(), Embed::kName).pointwise;
  check_shapes(op);
  for_rows(lane, op.out.size(0), [op, &loops](int64_t row) {
    const int64_t token = token_of(op, row);
    NF_CHECK(token >= 0 && token < op.table.size(0), "embed: row ", row, " holds token ", token,
             " but the vocabulary has ", op.table.size(0));
    if (op.scale == 1) {
      std::memcpy(row_of(op.out, row), row_of(op.table, token), row_bytes(op.table));
    } else {
      loops.scale(row_of(op.table, token), op.scale, row_of(op.out, row), op.table.size(1));
    }
  });
}

void CpuKernels::run(const RmsNorm& op, Lane& lane) {
  const PointwiseLoops& loops = loop_set(isa_).of(op.x.dtype(), RmsNorm::kName).pointwise;
  check_shapes(op);
  norm_rows(op, loops, lane);
}

void CpuKernels::run(const RopeAppend& op, Lane& lane) {
  const PointwiseLoops& loops = loop_set(isa_).of(op.qkv.dtype(), RopeAppend::kName).pointwise;
  check_shapes(op);
  for_rows(lane, op.qkv.size(0), [op, &loops](int64_t row) { rope_append_row(op, loops, row); });
}

void CpuKernels::run(const GatherRows& op, Lane& lane) {
  check_shapes(op);
  for_rows(lane, op.out.size(0), [op](int64_t row) {
    const int32_t index = op.index.data<int32_t>()[row];
    NF_CHECK(index < op.x.size(0), "gather_rows: index ", index, " of row ", row, " is outside x, ",
             op.x);
    if (index < 0) {
      std::memset(row_of(op.out, row), 0, row_bytes(op.out));
    } else {
      std::memcpy(row_of(op.out, row), row_of(op.x, index), row_bytes(op.out));
    }
  });
}

}  // namespace nanoflow::cpu
