#include "model/weights.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "core/error.h"
#include "kernels/ops.h"

namespace nanoflow {

Weights::Weights(const ModelSpec& spec, std::shared_ptr<Backend> backend)
    : spec_(spec), backend_(std::move(backend)) {
  spec_.check();
  layer_tensors_ = layer_tensors(spec_);
  const int64_t hidden = spec_.hidden_size;
  embed_ = arena_.add("embed", spec_.dtype, {spec_.vocab_size, hidden});
  first_layer_ = embed_ + 1;
  for (int layer = 0; layer < spec_.num_layers; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    for (const LayerTensor& tensor : layer_tensors_) {
      arena_.add(prefix + tensor.name, spec_.dtype, tensor.shape);
    }
  }
  norm_ = arena_.add("norm", spec_.dtype, {hidden});
  lm_head_ = spec_.tie_word_embeddings
                 ? embed_
                 : arena_.add("lm_head", spec_.dtype, {spec_.vocab_size, hidden});
  arena_.bind(backend_->allocate(arena_.bytes()));
  for (const Arena::Entry& entry : arena_.entries()) {
    loaded_.emplace_back(static_cast<size_t>(entry.shape[0]), false);
  }
}

std::vector<Weights::LayerTensor> Weights::layer_tensors(const ModelSpec& spec) {
  const int64_t hidden = spec.hidden_size, inner = spec.intermediate_size;
  const int64_t D = spec.head_dim, heads = spec.num_heads * D, qkv = spec.qkv_size();
  const int64_t experts = std::max(1, spec.num_experts);
  std::vector<LayerTensor> tensors = {
      {"input_norm", &Layer::input_norm, {hidden}},
      {"qkv", &Layer::qkv, {qkv, hidden}},
      {"o", &Layer::o, {hidden, heads}},
      {"post_norm", &Layer::post_norm, {hidden}},
      {"gate_up", &Layer::gate_up, {experts * 2 * inner, hidden}},
      {"down", &Layer::down, {experts * hidden, inner}},
  };
  if (spec.qkv_bias) tensors.push_back({"qkv_bias", &Layer::qkv_bias, {qkv}});
  if (spec.qk_norm) {
    tensors.push_back({"q_norm", &Layer::q_norm, {D}});
    tensors.push_back({"k_norm", &Layer::k_norm, {D}});
  }
  if (spec.has_experts()) tensors.push_back({"router", &Layer::router, {experts, hidden}});
  if (spec.post_norms) {
    tensors.push_back({"o_norm", &Layer::o_norm, {hidden}});
    tensors.push_back({"down_norm", &Layer::down_norm, {hidden}});
  }
  return tensors;
}

Weights::Place Weights::find(const std::string& name) const {
  constexpr int64_t kGroup = GemmSiluMul::kGroup;
  const bool is_gate = name.ends_with(".gate"), is_up = name.ends_with(".up");
  const std::string entry_name =
      is_gate || is_up ? name.substr(0, name.rfind('.')) + ".gate_up" : name;
  const auto& entries = arena_.entries();
  const auto entry = std::find_if(entries.begin(), entries.end(),
                                  [&](const Arena::Entry& e) { return e.name == entry_name; });
  NF_CHECK(entry != entries.end(), "the model has no weight named ", name);
  const int index = static_cast<int>(entry - entries.begin());
  const int64_t rows = entry->shape[0];
  if (entry_name == name) return {index, rows, 0, rows, rows};
  return {index, rows / 2, is_gate ? 0 : kGroup, kGroup, 2 * kGroup};
}

void Weights::load(const std::string& name, int64_t row_begin, const void* data, size_t bytes,
                   DType dtype) {
  const Place place = find(name);
  const Tensor tensor = arena_.tensor(place.entry);
  dispatch_float(dtype, name, [](auto) {});  // throws
  const auto row_values = static_cast<size_t>(tensor.numel() / tensor.size(0));
  const size_t row_bytes = row_values * size_of(dtype);
  NF_CHECK(bytes % row_bytes == 0, "weight ", name, " is ", tensor, "; ", bytes,
           " bytes are not whole rows of ", row_bytes);
  const auto rows = static_cast<int64_t>(bytes / row_bytes);
  NF_CHECK(row_begin >= 0 && row_begin + rows <= place.rows, "weight ", name, " has ", place.rows,
           " rows, not rows [", row_begin, ", ", row_begin + rows, ")");
  std::vector<RowRun> runs;
  for (int64_t i = row_begin; i < row_begin + rows; ++i) {
    const int64_t row = place.row(i);
    if (runs.empty() || runs.back().row + runs.back().count != row) runs.push_back({row, 0});
    ++runs.back().count;
    loaded_[place.entry][row] = true;
  }
  uploader().write(tensor, runs, data, dtype);
}

void Weights::fill_normal(const std::string& name, uint64_t seed, float mean, float std) {
  const Place place = find(name);
  const Tensor tensor = arena_.tensor(place.entry);
  NF_CHECK(place.rows == tensor.size(0), "weight ", name, " is only a part of ",
           arena_.entries()[place.entry].name, "; fill that");
  const FillNormal fill{.out = tensor, .seed = seed, .mean = mean, .std = std};
  backend_->kernels().run(fill, uploader().lane());
  std::fill(loaded_[place.entry].begin(), loaded_[place.entry].end(), true);
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

}  // namespace nanoflow
