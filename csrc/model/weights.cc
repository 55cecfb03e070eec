#include "model/weights.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "core/error.h"
#include "kernels/ops.h"

namespace nanoflow {

Weights::Weights(const ModelSpec& spec, std::shared_ptr<Backend> backend, bool with_o_columns)
    : backend_(std::move(backend)) {
  spec.check();
  const Communicator& communicator = backend_->communicator();
  spec_ = spec.shard(communicator.rank(), communicator.size());
  with_o_columns_ = with_o_columns && spec_.ranks > 1;
  layer_tensors_ = layer_tensors(spec);
  const Named head{"lm_head", {spec.vocab_size, spec.hidden_size}};
  embed_ = add("embed", {"embed", head.shape}, Split::kWhole);
  first_layer_ = embed_ + 1;
  for (int layer = 0; layer < spec.num_layers; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    for (const LayerTensor& tensor : layer_tensors_) {
      add(prefix + tensor.name, {prefix + tensor.filled_as, tensor.shape}, tensor.split);
    }
  }
  norm_ = add("norm", {"norm", {spec.hidden_size}}, Split::kWhole);
  lm_head_ = spec.tie_word_embeddings ? embed_ : add("lm_head", head, Split::kVocabulary);
  arena_.bind(backend_->allocate(arena_.bytes()));
  for (const Arena::Entry& entry : arena_.entries()) {
    loaded_.emplace_back(static_cast<size_t>(entry.shape[0]), false);
  }
}

std::vector<Weights::LayerTensor> Weights::layer_tensors(const ModelSpec& whole) const {
  const int64_t hidden = whole.hidden_size, inner = whole.intermediate_size;
  const int64_t D = whole.head_dim, heads = whole.num_heads * D, qkv = whole.qkv_size();
  const int64_t experts = std::max(1, whole.num_experts);
  std::vector<LayerTensor> tensors;
  const auto add = [&](const char* name, Tensor Layer::* field, std::vector<int64_t> shape,
                       Split split) {
    tensors.push_back({name, field, std::move(shape), split, name});
  };
  add("input_norm", &Layer::input_norm, {hidden}, Split::kWhole);
  add("qkv", &Layer::qkv, {qkv, hidden}, Split::kQkv);
  add("o", &Layer::o, {hidden, heads}, Split::kColumns);
  add("post_norm", &Layer::post_norm, {hidden}, Split::kWhole);
  add("gate_up", &Layer::gate_up, {experts * 2 * inner, hidden}, Split::kExpertRows);
  add("down", &Layer::down, {experts * hidden, inner}, Split::kColumns);
  if (whole.qkv_bias) add("qkv_bias", &Layer::qkv_bias, {qkv}, Split::kQkv);
  if (whole.qk_norm) {
    add("q_norm", &Layer::q_norm, {D}, Split::kWhole);
    add("k_norm", &Layer::k_norm, {D}, Split::kWhole);
  }
  if (whole.has_experts()) add("router", &Layer::router, {experts, hidden}, Split::kWhole);
  if (whole.post_norms) {
    add("o_norm", &Layer::o_norm, {hidden}, Split::kWhole);
    add("down_norm", &Layer::down_norm, {hidden}, Split::kWhole);
  }
  if (with_o_columns_) {
    tensors.push_back({"o_columns", &Layer::o_columns, {hidden, heads}, Split::kRows, "o"});
  }
  return tensors;
}

int Weights::add(const std::string& name, const Named& whole, Split split) {
  Share share = share_of(whole, split);
  std::vector<int64_t> shape = whole.shape;
  shape[0] = 0;
  for (const Part& part : share.parts) shape[0] += part.count;
  if (split == Split::kColumns) shape[1] /= spec_.ranks;
  if (name == whole.name) tensors_.push_back(whole);
  shares_.push_back(std::move(share));
  return arena_.add(name, spec_.dtype, std::move(shape));
}

Weights::Share Weights::share_of(const Named& whole, Split split) const {
  const int64_t rows = whole.shape[0];
  Share share{.whole = whole, .parts = {{0, rows, 0}}, .column = 0};
  if (split == Split::kRows)
    share.parts = {{spec_.rank * (rows / spec_.ranks), rows / spec_.ranks, 0}};
  if (split == Split::kExpertRows) share.parts = expert_parts(rows);
  if (split == Split::kColumns) share.column = spec_.rank * (whole.shape[1] / spec_.ranks);
  if (split == Split::kQkv) share.parts = qkv_parts();
  if (split == Split::kVocabulary) {
    const int64_t begin = spec_.vocab_begin(), end = spec_.vocab_end();
    share.parts = {{begin, end - begin, 0}};
  }
  return share;
}

std::vector<Weights::Part> Weights::qkv_parts() const {
  const int64_t D = spec_.head_dim, q = spec_.num_heads * D, kv = spec_.num_kv_heads * D;
  const int64_t all_q = q * spec_.ranks, all_kv = kv * spec_.ranks / spec_.kv_replicas;
  const int64_t first_kv = spec_.rank / spec_.kv_replicas * kv;
  return {
      {spec_.rank * q, q, 0}, {all_q + first_kv, kv, q}, {all_q + all_kv + first_kv, kv, q + kv}};
}

std::vector<Weights::Part> Weights::expert_parts(int64_t rows) const {
  const int64_t experts = std::max(1, spec_.num_experts), of_one = rows / experts;
  const int64_t own = of_one / spec_.ranks;
  std::vector<Part> parts;
  for (int64_t expert = 0; expert < experts; ++expert) {
    parts.push_back({expert * of_one + spec_.rank * own, own, expert * own});
  }
  return parts;
}

const Weights::Part* Weights::Share::with(int64_t row) const {
  const auto ends_before = [row](const Part& part) { return part.first + part.count <= row; };
  const auto found = std::partition_point(parts.begin(), parts.end(), ends_before);
  return found == parts.end() || row < found->first ? nullptr : &*found;
}

Weights::Place Weights::find(const std::string& name) const {
  constexpr int64_t kGroup = GemmSiluMul::kGroup;
  const bool is_gate = name.ends_with(".gate"), is_up = name.ends_with(".up");
  const std::string tensor = is_gate || is_up ? name.substr(0, name.rfind('.')) + ".gate_up" : name;
  const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                  [&](const Named& named) { return named.name == tensor; });
  NF_CHECK(found != tensors_.end(), "the model has no weight named ", name);
  const int64_t rows = found->shape[0];
  if (tensor == name) return {tensor, rows, 0, rows, rows};
  return {tensor, rows / 2, is_gate ? 0 : kGroup, kGroup, 2 * kGroup};
}

std::vector<int> Weights::entries_of(const std::string& tensor) const {
  std::vector<int> entries;
  for (size_t i = 0; i < shares_.size(); ++i) {
    if (shares_[i].whole.name == tensor) entries.push_back(static_cast<int>(i));
  }
  return entries;
}

void Weights::load(const std::string& name, int64_t row_begin, const void* data, size_t bytes,
                   DType dtype) {
  const Place place = find(name);
  dispatch_float(dtype, name, [](auto) {});  // throws
  for (int entry : entries_of(place.tensor)) {
    const Share& share = shares_[entry];
    const int64_t row_values = share.whole.shape.size() == 1 ? 1 : share.whole.shape[1];
    const size_t row_bytes = static_cast<size_t>(row_values) * size_of(dtype);
    NF_CHECK(bytes % row_bytes == 0, "weight ", name, " has ", row_values, " columns of ", dtype,
             "; ", bytes, " bytes are not whole rows of ", row_bytes);
    const auto rows = static_cast<int64_t>(bytes / row_bytes);
    NF_CHECK(row_begin >= 0 && row_begin + rows <= place.rows, "weight ", name, " has ", place.rows,
             " rows, not rows [", row_begin, ", ", row_begin + rows, ")");
    std::vector<RowRun> runs;
    for (int64_t from = 0; from < rows; ++from) {
      const int64_t row = place.row(row_begin + from);
      const Part* part = share.with(row);
      if (part == nullptr) continue;
      const int64_t own = part->row + row - part->first;
      const bool follows = !runs.empty() && runs.back().row + runs.back().count == own &&
                           runs.back().from + runs.back().count == from;
      if (!follows) runs.push_back({from, own, 0});
      ++runs.back().count;
      loaded_[entry][own] = true;
    }
    const auto* first =
        static_cast<const std::byte*>(data) + static_cast<size_t>(share.column) * size_of(dtype);
    uploader().write(arena_.tensor(entry), runs,
                     {.data = first, .dtype = dtype, .stride = row_values});
  }
}

void Weights::fill_normal(const std::string& name, uint64_t seed, float mean, float std) {
  const Place place = find(name);
  NF_CHECK(place.tensor == name, "weight ", name, " is only a part of ", place.tensor,
           "; fill that");
  for (int entry : entries_of(name)) {
    const Share& share = shares_[entry];
    const Tensor tensor = arena_.tensor(entry);
    const int64_t columns = tensor.dims() == 1 ? 1 : share.whole.shape[1];
    for (const Part& part : share.parts) {
      const FillNormal fill{.out = tensor.slice_rows(part.row, part.row + part.count),
                            .seed = seed,
                            .mean = mean,
                            .std = std,
                            .first = static_cast<uint64_t>(part.first * columns + share.column),
                            .stride = tensor.dims() == 1 ? 0 : columns};
      backend_->kernels().run(fill, uploader().lane());
    }
    std::fill(loaded_[entry].begin(), loaded_[entry].end(), true);
  }
}

Uploader& Weights::uploader() {
  if (uploader_ == nullptr) uploader_ = std::make_unique<Uploader>(*backend_);
  return *uploader_;
}

void Weights::finish() {
  if (uploader_ != nullptr) uploader_->finish();
  uploader_.reset();
  std::ostringstream missing;
  for (size_t i = 0; i < loaded_.size(); ++i) {
    const auto rows = std::count(loaded_[i].begin(), loaded_[i].end(), false);
    if (rows == 0) continue;
    missing << (missing.tellp() > 0 ? ", " : "") << arena_.entries()[i].name << " (" << rows
            << " of " << loaded_[i].size() << " rows)";
  }
  NF_CHECK(missing.tellp() == 0, "weights were not loaded: ", missing.str());
}

void Weights::sleep(bool discards) {
  if (arena_.data() == nullptr) return;
  if (discards) {
    for (std::vector<bool>& rows : loaded_) std::fill(rows.begin(), rows.end(), false);
  } else if (backend_->device().kind == Device::Kind::kCpu) {
    return;
  } else {
    kept_ = backend_->allocate_host(arena_.bytes());
    copy_all(kept_.data(), arena_.data());
  }
  arena_.unbind();
}

void Weights::wake_up() {
  if (arena_.data() != nullptr) return;
  arena_.bind(backend_->allocate(arena_.bytes()));
  if (kept_.data() != nullptr) copy_all(arena_.data(), kept_.data());
  kept_ = Buffer();
}

void Weights::copy_all(std::byte* to, const std::byte* from) {
  const std::unique_ptr<Lane> lane = backend_->make_copy_lane();
  const std::unique_ptr<Event> copied = backend_->make_event();
  backend_->copy(to, from, arena_.bytes(), *lane);
  lane->record(*copied);
  copied->synchronize();
}

Tensor Weights::by_expert(const Tensor& rows) const {
  const int64_t experts = spec_.num_experts;
  if (experts == 0) return rows;
  return Tensor(rows.bytes(), rows.dtype(), rows.device(),
                {experts, rows.size(0) / experts, rows.size(1)});
}

Weights::Layer Weights::layer(int index) const {
  int next = first_layer_ + index * static_cast<int>(layer_tensors_.size());
  Layer layer;
  for (const LayerTensor& tensor : layer_tensors_) layer.*tensor.field = arena_.tensor(next++);
  layer.gate_up = by_expert(layer.gate_up);
  layer.down = by_expert(layer.down);
  return layer;
}

Tensor Weights::lm_head() const {
  const Tensor tensor = arena_.tensor(lm_head_);
  return lm_head_ == embed_ ? tensor.slice_rows(spec_.vocab_begin(), spec_.vocab_end()) : tensor;
}

}  // namespace nanoflow
