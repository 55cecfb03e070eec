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

/// The weights of one rank, in one allocation of the backend's memory, filled tensor by tensor. The
/// tensors of the whole model are named and given; of each, the rank keeps its part: rows of qkv,
/// gate_up and lm_head (whole heads, and the same channels of gate and up), columns of o and down,
/// all of the others. Of experts it keeps channels of each, not some of them whole: so all ranks
/// have the same to do whichever experts a batch chooses, and what they give is summed as any
/// MLP's.
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
    Tensor o_columns;  // [H / ranks, all Hq * D]: rows of o, for these columns of its output
  };

  /// A tensor of the whole model.
  struct Named {
    std::string name;
    std::vector<int64_t> shape;
  };

  /// For the rank of the backend's communicator, of a model of this spec. `with_o_columns`: also
  /// its rows of every o (see Layer), which schedules that gather attention outputs need where
  /// there are several ranks.
  Weights(const ModelSpec& spec, std::shared_ptr<Backend> backend, bool with_o_columns = false);

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

  /// Gives the device's memory back: what it held is kept in host memory, where a CPU has it
  /// already, or with `discards` lost. No tensor may be in use, nor be asked for until wake_up().
  /// Throws Error when the host has no room; nothing has changed then.
  void sleep(bool discards);
  /// Takes memory of the device again, elsewhere than before. What was kept is there then; what was
  /// discarded has to be filled again, and finished. Throws OutOfMemory when the device has no
  /// room.
  void wake_up();

  /// The rank's part.
  const ModelSpec& spec() const { return spec_; }
  const std::shared_ptr<Backend>& backend() const { return backend_; }
  size_t bytes() const { return arena_.bytes(); }
  Tensor embed() const { return arena_.tensor(embed_); }
  Tensor norm() const { return arena_.tensor(norm_); }
  /// Rows vocab_begin() to vocab_end() of the spec.
  Tensor lm_head() const;
  /// What the spec does not ask for is empty. With experts gate_up is [E, 2 I, H], down [E, H, I].
  Layer layer(int index) const;
  /// Whether layers have o_columns.
  bool has_o_columns() const { return with_o_columns_; }
  /// The tensors to fill, in order.
  const std::vector<Named>& tensors() const { return tensors_; }
  /// Names, dtypes and shapes of what the rank holds, in order.
  const std::vector<Arena::Entry>& entries() const { return arena_.entries(); }
  /// The tensor of an entry.
  Tensor tensor(int entry) const { return arena_.tensor(entry); }

 private:
  /// Rows [first, first + count) of a model's tensor, which lie in the rank's from `row` on.
  struct Part {
    int64_t first, count, row;
  };
  /// What an entry of the arena holds: some rows of a tensor, from a column on.
  struct Share {
    Named whole;
    std::vector<Part> parts;  // in order
    int64_t column;

    /// The part with a row of the model's tensor; null where there is none.
    const Part* with(int64_t row) const;
  };
  /// Where the rows of a name lie: row i is row begin + i / group * stride + i % group of a tensor.
  struct Place {
    std::string tensor;
    int64_t rows, begin, group, stride;

    int64_t row(int64_t i) const { return begin + i / group * stride + i % group; }
  };

  /// What of a tensor a rank holds.
  enum class Split {
    kWhole,       // all
    kRows,        // its share of the rows
    kExpertRows,  // its share of the rows of every expert, or of the only MLP
    kColumns,     // its share of the columns
    kQkv,         // rows: those of its heads of q, k and v
    kVocabulary,  // rows: those of its tokens
  };
  /// A tensor that every layer holds, of the whole model.
  struct LayerTensor {
    const char* name;
    Tensor Layer::* field;
    std::vector<int64_t> shape;
    Split split;
    const char* filled_as;  // the tensor it is filled with: its own name but for copies
  };

  /// In the order they have in the arena.
  std::vector<LayerTensor> layer_tensors(const ModelSpec& whole) const;
  int add(const std::string& name, const Named& whole, Split split);
  Share share_of(const Named& whole, Split split) const;
  std::vector<Part> qkv_parts() const;
  std::vector<Part> expert_parts(int64_t rows) const;
  Place find(const std::string& name) const;
  /// The rows of all experts as [E, rows of one, columns]; what it is given, in a model without.
  Tensor by_expert(const Tensor& rows) const;
  std::vector<int> entries_of(const std::string& tensor) const;
  Uploader& uploader();
  void copy_all(std::byte* to, const std::byte* from);

  ModelSpec spec_;
  std::shared_ptr<Backend> backend_;
  bool with_o_columns_ = false;
  std::vector<LayerTensor> layer_tensors_;
  Arena arena_;
  std::vector<Named> tensors_;
  std::vector<Share> shares_;                                 // by arena index
  int embed_ = 0, norm_ = 0, lm_head_ = 0, first_layer_ = 0;  // arena indices
  std::vector<std::vector<bool>> loaded_;                     // per entry, per row
  std::unique_ptr<Uploader> uploader_;                        // while weights are loaded
  Buffer kept_;                                               // on the host, while asleep
};

}  // namespace nanoflow
