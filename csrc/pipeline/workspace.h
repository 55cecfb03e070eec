#pragma once

#include <array>
#include <vector>

#include "core/arena.h"
#include "model/decoder.h"
#include "pipeline/batch.h"
#include "pipeline/engine.h"
#include "pipeline/kv_cache.h"
#include "pipeline/plan.h"

namespace nanoflow {

/// Every fixed buffer of one rank. Activations, token pool and step tables live on the device; the
/// tables have one staging copy on the host for each step in flight, of the same layout, so that a
/// step starts with one copy in stream order.
class Workspace {
 public:
  static constexpr int kMaxSegments = 16;
  static constexpr int kBannedPerRequest = 64;
  static constexpr int kBiasesPerRequest = 512;

  /// `gathers`: attention outputs of all ranks are gathered.
  Workspace(const EngineConfig& config, const ModelSpec& spec, Backend& backend,
            bool gathers = false);

  /// Adds the cache, which is made last, of the memory that is left; returns buffers().
  const DecoderBuffers& bind(const KvCache& cache);

  const DecoderBuffers& buffers() const { return buffers_; }
  BatchLimits limits(int segments) const;
  /// Rows of each segment and samples, padded. `cuts` are the schedule's.
  PlanKey key_of(const Batch& batch, const std::vector<double>& cuts) const;
  PlanKey padded(const std::vector<int>& segment_rows, int samples,
                 const std::vector<double>& cuts) const;
  /// Fills staging copy `ring` from a valid batch. No step may be using the copy.
  void stage(const Batch& batch, const PlanKey& key, int ring);
  /// Enqueues one copy of what `batch` uses of staging copy `ring` to the tables, and copies of the
  /// lists that few batches have.
  void upload(const Batch& batch, int ring, Lane& lane);
  size_t bytes() const { return activations_.bytes() + tables_.bytes(); }

 private:
  void allocate_activations(bool gathers);
  size_t gather_work_bytes(int64_t rows, int64_t samples, bool gathers) const;
  /// Of a model with experts, before and after the memory is there.
  void describe_experts(int64_t rows);
  void bind_experts();
  void allocate_tables();
  void upload_rope_tables();
  void upload_rope_table(const Tensor& to, const std::vector<float>& inv_freq,
                         float attention_factor);
  /// Where a table lives in a staging copy.
  template <typename T>
  T* staged(const Tensor& table, int ring) const;
  /// Fills a table with `values`, then with `padding` up to `size` entries.
  template <typename T>
  void stage_padded(const Tensor& table, const std::vector<T>& values, int size, T padding,
                    int ring);
  void stage_rows(const Batch& batch, const PlanKey& key, int ring);
  void stage_samples(const Batch& batch, const PlanKey& key, int ring);
  void stage_penalties(const Batch& batch, const PlanKey& key, int ring);
  void stage_constraints(const Batch& batch, const PlanKey& key, int ring);
  void stage_logprobs(const Batch& batch, const PlanKey& key, int ring);
  template <typename T>
  void stage_list(Buffer& list, const std::vector<T>& values);
  int max_samples() const { return config_.max_num_seqs + config_.max_scored_rows; }

  EngineConfig config_;
  ModelSpec spec_;
  Backend& backend_;
  int granularity_;
  Arena activations_, tables_;
  std::array<Buffer, Engine::kMaxStepsInFlight> staging_;
  struct Lists {  // of a step, on the host; they grow as needed
    Buffer histories, bias_tokens, bias_values, masks;
  };
  std::array<Lists, Engine::kMaxStepsInFlight> lists_;
  DecoderBuffers buffers_;
  int num_pages_ = 0;
  std::vector<int> padded_row_;  // of each row of the batch being staged
};

}  // namespace nanoflow
