#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <string>

#include "bindings/array.h"
#include "bindings/register.h"
#include "model/model_folder.h"
#include "model/spec.h"
#include "model/weights.h"

namespace py = pybind11;

namespace nanoflow {
namespace {

void register_spec(py::module_& m) {
  py::class_<ModelSpec>(m, "ModelSpec", "Dimensions and traits of a decoder of the Llama family.")
      .def(py::init([](int vocab_size, int hidden_size, int intermediate_size, int num_layers,
                       int num_heads, int num_kv_heads, int head_dim,
                       std::vector<float> rope_inv_freq, float rms_norm_eps,
                       bool tie_word_embeddings, bool qkv_bias, bool qk_norm, int num_experts,
                       int experts_per_token, bool norm_topk_prob, float rope_attention_factor,
                       std::vector<float> rope_local_inv_freq, std::vector<int> layer_windows,
                       const std::string& activation, float embed_scale, float attention_scale,
                       bool norm_unit_offset, bool post_norms, const std::string& dtype) {
             ModelSpec spec{.vocab_size = vocab_size,
                            .hidden_size = hidden_size,
                            .intermediate_size = intermediate_size,
                            .num_layers = num_layers,
                            .num_heads = num_heads,
                            .num_kv_heads = num_kv_heads,
                            .head_dim = head_dim,
                            .rms_norm_eps = rms_norm_eps,
                            .tie_word_embeddings = tie_word_embeddings,
                            .qkv_bias = qkv_bias,
                            .qk_norm = qk_norm,
                            .num_experts = num_experts,
                            .experts_per_token = experts_per_token,
                            .norm_topk_prob = norm_topk_prob,
                            .dtype = parse_dtype(dtype),
                            .rope_inv_freq = std::move(rope_inv_freq),
                            .rope_attention_factor = rope_attention_factor,
                            .rope_local_inv_freq = std::move(rope_local_inv_freq),
                            .layer_windows = std::move(layer_windows),
                            .activation = parse_activation(activation),
                            .embed_scale = embed_scale,
                            .attention_scale = attention_scale,
                            .norm_unit_offset = norm_unit_offset,
                            .post_norms = post_norms};
             spec.check();
             return spec;
           }),
           py::kw_only(), py::arg("vocab_size"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::arg("num_layers"), py::arg("num_heads"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("rope_inv_freq"),
           py::arg("rms_norm_eps") = 1e-5f, py::arg("tie_word_embeddings") = false,
           py::arg("qkv_bias") = false, py::arg("qk_norm") = false, py::arg("num_experts") = 0,
           py::arg("experts_per_token") = 0, py::arg("norm_topk_prob") = false,
           py::arg("rope_attention_factor") = 1.0f,
           py::arg("rope_local_inv_freq") = std::vector<float>(),
           py::arg("layer_windows") = std::vector<int>(), py::arg("activation") = "silu",
           py::arg("embed_scale") = 1.0f, py::arg("attention_scale") = 0.0f,
           py::arg("norm_unit_offset") = false, py::arg("post_norms") = false,
           py::arg("dtype") = "bfloat16")
      .def_readonly("vocab_size", &ModelSpec::vocab_size)
      .def_readonly("hidden_size", &ModelSpec::hidden_size)
      .def_readonly("intermediate_size", &ModelSpec::intermediate_size)
      .def_readonly("num_layers", &ModelSpec::num_layers)
      .def_readonly("num_heads", &ModelSpec::num_heads)
      .def_readonly("num_kv_heads", &ModelSpec::num_kv_heads)
      .def_readonly("head_dim", &ModelSpec::head_dim)
      .def_readonly("rope_inv_freq", &ModelSpec::rope_inv_freq)
      .def_readonly("rope_attention_factor", &ModelSpec::rope_attention_factor)
      .def_readonly("rope_local_inv_freq", &ModelSpec::rope_local_inv_freq)
      .def_readonly("layer_windows", &ModelSpec::layer_windows)
      .def_property_readonly(
          "activation",
          [](const ModelSpec& spec) { return std::string(to_string(spec.activation)); })
      .def_readonly("embed_scale", &ModelSpec::embed_scale)
      .def_readonly("attention_scale", &ModelSpec::attention_scale)
      .def_readonly("norm_unit_offset", &ModelSpec::norm_unit_offset)
      .def_readonly("post_norms", &ModelSpec::post_norms)
      .def_readonly("rms_norm_eps", &ModelSpec::rms_norm_eps)
      .def_readonly("tie_word_embeddings", &ModelSpec::tie_word_embeddings)
      .def_readonly("qkv_bias", &ModelSpec::qkv_bias)
      .def_readonly("qk_norm", &ModelSpec::qk_norm)
      .def_readonly("num_experts", &ModelSpec::num_experts)
      .def_readonly("experts_per_token", &ModelSpec::experts_per_token)
      .def_readonly("norm_topk_prob", &ModelSpec::norm_topk_prob)
      .def_property_readonly(
          "dtype", [](const ModelSpec& spec) { return std::string(to_string(spec.dtype)); })
      .def_property_readonly("kv_bytes_per_token", &ModelSpec::kv_bytes_per_token);
}

}  // namespace

void register_model(py::module_& m) {
  register_spec(m);
  py::class_<Weights, std::shared_ptr<Weights>>(
      m, "Weights",
      "The weights of one rank in the backend's memory, filled with the tensors of the whole "
      "model, of which it keeps its part.")
      .def(py::init<const ModelSpec&, std::shared_ptr<Backend>, bool>(), py::arg("spec"),
           py::arg("backend"), py::arg("with_o_columns") = false,
           "For the backend's rank, of a model of this spec. `with_o_columns`: for schedules that "
           "gather attention outputs.")
      .def(
          "load",
          [](Weights& weights, const std::string& name, const py::array& array, int row_begin) {
            const Tensor tensor = as_tensor(array);
            NF_CHECK(tensor.is_contiguous(), "weight ", name, " is not contiguous");
            py::gil_scoped_release release;
            weights.load(name, row_begin, tensor.bytes(), tensor.span_bytes(), tensor.dtype());
          },
          py::arg("name"), py::arg("array"), py::arg("row_begin") = 0,
          "Copies rows into a tensor, converting float32, float16 or bfloat16 (a uint16 array).")
      .def(
          "fill_normal", &Weights::fill_normal, py::arg("name"), py::arg("seed"), py::arg("mean"),
          py::arg("std"), py::call_guard<py::gil_scoped_release>(),
          "Fills a tensor with normal random values, on the device; they depend on the seed alone.")
      .def("finish", &Weights::finish, py::call_guard<py::gil_scoped_release>(),
           "Waits for the copies. Raises EngineError naming every tensor with rows that were never "
           "loaded.")
      .def(
          "shapes",
          [](const Weights& weights) {
            py::dict shapes;
            for (const Weights::Named& tensor : weights.tensors()) {
              shapes[py::str(tensor.name)] = py::tuple(py::cast(tensor.shape));
            }
            return shapes;
          },
          "Of the tensors to fill, which are the whole model's.")
      .def_property_readonly("bytes", &Weights::bytes)
      .def_property_readonly("spec", &Weights::spec, "Of the rank's part.")
      .def_property_readonly("backend", &Weights::backend);
  m.def("write_model", &write_model, py::arg("weights"), py::arg("folder"),
        py::call_guard<py::gil_scoped_release>(),
        "Writes complete weights of a CPU backend as C++ reads them; see model/model_folder.h.");
}

}  // namespace nanoflow
