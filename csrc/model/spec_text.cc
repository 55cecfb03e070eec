#include "model/spec_text.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <type_traits>
#include <vector>

#include "core/error.h"

namespace nanoflow {
namespace {

/// Calls visit(name, field) for every field of a spec: what to_text() and SpecReader know of it. A
/// field that is missing here does not compile. Of parts of a model there is no text: the fields of
/// ranks stay as they are.
template <typename Spec, typename Visit>
void visit_fields(Spec& spec, Visit&& visit) {
  auto& [vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim,
         rms_norm_eps, tie_word_embeddings, qkv_bias, qk_norm, num_experts, experts_per_token,
         norm_topk_prob, dtype, rope_inv_freq, rope_attention_factor, rope_local_inv_freq,
         layer_windows, activation, embed_scale, attention_scale, norm_unit_offset, post_norms,
         rank, ranks, kv_replicas] = spec;
  static_cast<void>(rank), static_cast<void>(ranks), static_cast<void>(kv_replicas);
  visit("vocab_size", vocab_size);
  visit("hidden_size", hidden_size);
  visit("intermediate_size", intermediate_size);
  visit("num_layers", num_layers);
  visit("num_heads", num_heads);
  visit("num_kv_heads", num_kv_heads);
  visit("head_dim", head_dim);
  visit("rms_norm_eps", rms_norm_eps);
  visit("tie_word_embeddings", tie_word_embeddings);
  visit("qkv_bias", qkv_bias);
  visit("qk_norm", qk_norm);
  visit("num_experts", num_experts);
  visit("experts_per_token", experts_per_token);
  visit("norm_topk_prob", norm_topk_prob);
  visit("dtype", dtype);
  visit("rope_inv_freq", rope_inv_freq);
  visit("rope_attention_factor", rope_attention_factor);
  visit("rope_local_inv_freq", rope_local_inv_freq);
  visit("layer_windows", layer_windows);
  visit("activation", activation);
  visit("embed_scale", embed_scale);
  visit("attention_scale", attention_scale);
  visit("norm_unit_offset", norm_unit_offset);
  visit("post_norms", post_norms);
}

template <typename T>
std::string number_text(T value) {
  std::array<char, 32> buffer;
  const auto [end, error] = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
  return {buffer.data(), end};
}

std::string value_text(int value) { return number_text(value); }
std::string value_text(float value) { return number_text(value); }
std::string value_text(bool value) { return value ? "true" : "false"; }
std::string value_text(DType value) { return std::string(to_string(value)); }
std::string value_text(Activation value) { return std::string(to_string(value)); }

template <typename T>
std::string value_text(const std::vector<T>& values) {
  std::string text;
  for (const T& value : values) text += (text.empty() ? "" : " ") + value_text(value);
  return text;
}

template <typename T>
  requires std::is_arithmetic_v<T>
void parse_value(std::string_view text, T& value) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  NF_CHECK(error == std::errc() && stop == end, "'", text, "' is not a number of its kind");
}

void parse_value(std::string_view text, bool& value) {
  NF_CHECK(text == "true" || text == "false", "'", text, "' is neither true nor false");
  value = text == "true";
}

void parse_value(std::string_view text, DType& value) { value = parse_dtype(text); }

void parse_value(std::string_view text, Activation& value) { value = parse_activation(text); }

template <typename T>
void parse_value(std::string_view text, std::vector<T>& values) {
  values.clear();
  while (!text.empty()) {
    const size_t length = std::min(text.find(' '), text.size());
    parse_value(text.substr(0, length), values.emplace_back());
    text.remove_prefix(std::min(length + 1, text.size()));
  }
}

std::string between_spaces(std::string_view name) { return " " + std::string(name) + " "; }

}  // namespace

std::string to_text(const ModelSpec& spec) {
  std::string text;
  visit_fields(spec, [&](const char* name, const auto& field) {
    text += std::string(name) + " " + value_text(field) + "\n";
  });
  return text;
}

void SpecReader::read(std::string_view name, std::string_view value) {
  NF_CHECK(seen_.find(between_spaces(name)) == std::string::npos, name, " is given twice");
  bool is_known = false;
  visit_fields(spec_, [&](std::string_view known, auto& field) {
    if (known != name) return;
    parse_value(value, field);
    is_known = true;
  });
  NF_CHECK(is_known, name, " is no field of a model that this nanoflow knows");
  seen_ += std::string(name) + " ";
}

ModelSpec SpecReader::finish() const {
  std::string missing;
  visit_fields(spec_, [&](const char* name, const auto&) {
    if (seen_.find(between_spaces(name)) == std::string::npos) missing += " " + std::string(name);
  });
  NF_CHECK(missing.empty(), "fields are missing:", missing, "; export the model again");
  spec_.check();
  return spec_;
}

}  // namespace nanoflow
