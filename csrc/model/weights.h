#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/tensor.h"
#include "kernels/backend.h"
#include "model/spec.h"
#include "model/upload.h"

namespace nanoflow {

/// The weights of one rank, in one allocation of the backend's memory, filled tensor by tensor.
///
/// | name                | shape                 | what                                           |
/// |---------------------|-----------------------|------------------------------------------------|
/// | embed               | [V, H]                | token embeddings                               |
/// | layers.N.input_norm | [H]                   | before attention                               |
/// | layers.N.qkv        | [(Hq + 2 Hkv) * D, H] | rows of q, then k, then v                      |
/// | layers.N.o          | [H, Hq * D]           | attention output                               |
/// | layers.N.post_norm  | [H]                   | before the MLP                                 |
/// | layers.N.gate_up    | [2 I, H]              | gate and up in groups, see GemmSiluMul         |
/// | layers.N.down       | [H, I]                | MLP output                                     |
/// | layers.N.qkv_bias   | [(Hq + 2 Hkv) * D]    | where the spec says so                         |
/// | layers.N.q_norm     | [D]                   | where the spec says so: of each head of q      |
/// | layers.N.k_norm     | [D]                   | with q_norm: of each head of k                 |
/// | layers.N.router     | [E, H]                | in a model with experts                        |
/// | layers.N.o_norm     | [H]                   | with post_norms: of the attention's output     |
/// | layers.N.down_norm  | [H]                   | with post_norms: of the MLP's output           |
/// | norm                | [H]                   | before the head                                |
/// | lm_head             | [V, H]                | absent when embeddings are tied                |
///
/// With experts gate_up is [E * 2 I, H] and down [E * H, I]: those of one expert after another.
class Weights {
 public:
  struct Layer {
    Tensor input_norm, qkv, o, post_norm, gate_up, down, qkv_bias, q_norm, k_norm, router, o_norm,
        down_norm;
  };

  Weights(const ModelSpec& spec, std::shared_ptr<Backend> backend);

  /// Copies rows [row_begin, row_begin + rows) of a tensor from host memory, converting between
  /// floating dtypes. `data` holds whole rows, contiguous, and is free once this returns.
  /// layers.N.gate and layers.N.up, [I, H] each ([E * I, H] with experts), are names too: their
  /// rows go to their groups of gate_up. Throws Error on an unknown name, rows outside the tensor,
  /// or a byte count that is not a multiple of a row.
  void load(const std::string& name, int64_t row_begin, const void* data, size_t bytes,
            DType dtype);
  /// Fills a tensor with random values on the device: see FillNormal.
  void fill_normal(const std::string& name, uint64_t seed, float mean, float std);
  /// Waits until everything has reached the device, and frees what loading took. Throws what made a
  /// copy fail, or one Error that names every tensor with rows that were never loaded.
  void finish();

  const ModelSpec& spec() const { return spec_; }
  const std::shared_ptr<Backend>& backend() const { return backend_; }
  size_t bytes() const { return arena_.bytes(); }
  Tensor embed() const { return arena_.tensor(embed_); }
  Tensor norm() const { return arena_.tensor(norm_); }
  Tensor lm_head() const { return arena_.tensor(lm_head_); }
  /// What the spec does not ask for is empty. With experts gate_up is [E, 2 I, H], down [E, H, I].
  Layer layer(int index) const;
  /// Names, dtypes and shapes, in order.
  const std::vector<Arena::Entry>& entries() const { return arena_.entries(); }
  /// The tensor of an entry.
  Tensor tensor(int entry) const { return arena_.tensor(entry); }

 private:
  /// Where the rows of a name lie: row i is row begin + i / group * stride + i % group of an entry.
  struct Place {
    int entry;
    int64_t rows, begin, group, stride;

    int64_t row(int64_t i) const { return begin + i / group * stride + i % group; }
  };

  /// A tensor that every layer holds.
  struct LayerTensor {
    const char* name;
    Tensor Layer::* field;
    std::vector<int64_t> shape;
  };

  /// In the order they have in the arena.
  static std::vector<LayerTensor> layer_tensors(const ModelSpec& spec);

  Place find(const std::string& name) const;
  /// The rows of all experts as [E, rows of one, columns]; what it is given, in a model without.
  Tensor by_expert(const Tensor& rows) const;
  Uploader& uploader();

  ModelSpec spec_;
  std::shared_ptr<Backend> backend_;
  std::vector<LayerTensor> layer_tensors_;
  Arena arena_;
  int embed_ = 0, norm_ = 0, lm_head_ = 0, first_layer_ = 0;  // arena indices
  std::vector<std::vector<bool>> loaded_;                     // per entry, per row
  std::unique_ptr<Uploader> uploader_;                        // while weights are loaded
};

}  // namespace nanoflow
