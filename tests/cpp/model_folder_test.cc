#include "model/model_folder.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <sstream>

#include "core/error.h"
#include "model/spec_text.h"
#include "nanoflow.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

/// A folder that is gone with the test.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "nanoflow-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { std::filesystem::remove_all(path); }

  std::string model_text() const {
    std::ifstream in(path / kModelFile);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void set_model_text(const std::string& text) const { std::ofstream(path / kModelFile) << text; }

  std::filesystem::path path;
};

std::shared_ptr<Backend> cpu() { return make_backend({.device = {}, .threads = 2, .isa = "auto"}); }

std::string replaced(std::string text, const std::string& old, const std::string& fresh) {
  const size_t at = text.find(old);
  REQUIRE(at != std::string::npos);
  return text.replace(at, old.size(), fresh);
}

}  // namespace

TEST_CASE("a model that was written is read as the same bits") {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    ModelSpec spec = tiny_spec(2, dtype);
    if (dtype == DType::kBF16) {
      spec.qkv_bias = spec.qk_norm = true;
      spec.layer_windows = {16, 0};
    }
    spec.qk_norm = dtype == DType::kF32;
    if (dtype == DType::kF16) {
      spec.layer_windows = {0, 7};
      spec.rope_local_inv_freq = spec.rope_inv_freq;
      spec.activation = Activation::kGeluTanh;
      spec.post_norms = spec.norm_unit_offset = true;
    }
    spec.rope_attention_factor = 1.25f;
    spec.rms_norm_eps = 1e-6f;
    const Folder folder;
    const auto written = random_weights(spec, cpu());
    written->finish();
    write_model(*written, folder.path);
    CHECK(to_text(read_spec(folder.path)) == to_text(spec));
    CHECK(read_spec(folder.path).rope_inv_freq == spec.rope_inv_freq);
    CHECK(read_spec(folder.path).layer_windows == spec.layer_windows);
    const auto read = read_weights(folder.path, cpu());
    REQUIRE(read->entries().size() == written->entries().size());
    for (size_t i = 0; i < written->entries().size(); ++i) {
      const Tensor a = written->tensor(static_cast<int>(i)), b = read->tensor(static_cast<int>(i));
      REQUIRE(a.span_bytes() == b.span_bytes());
      CHECK(std::memcmp(a.bytes(), b.bytes(), a.span_bytes()) == 0);
    }
  }
}

TEST_CASE("what is wrong with a model folder is told with its place") {
  const Folder folder;
  const auto problem = [&] {
    try {
      read_weights(folder.path, cpu());
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const auto has = [](const std::string& text, const std::string& part) {
    CAPTURE(text);
    CHECK(text.find(part) != std::string::npos);
  };
  has(problem(), "`nanoflow export-spec MODEL FOLDER` writes one");
  const auto weights = random_weights(tiny_spec(1), cpu());
  weights->finish();
  write_model(*weights, folder.path);
  const std::string good = folder.model_text();
  const auto with = [&](const std::string& old, const std::string& fresh) {
    folder.set_model_text(replaced(good, old, fresh));
    return problem();
  };
  has(with("nanoflow-model 1", "nanoflow-model 9"), "begins with 'nanoflow-model 9'");
  has(with("hidden_size 32", "hidden_size many"), "line 3: 'many' is not a number");
  has(with("hidden_size 32", "hidden_size 32 1"), "line 3: '32 1' is not a number");
  has(with("hidden_size 32\n", ""), "fields are missing: hidden_size");
  has(with("hidden_size 32", "hiden_size 32"), "hiden_size is no field of a model");
  has(with("hidden_size 32", "vocab_size 32"), "vocab_size is given twice");
  has(with("qkv_bias false", "qkv_bias no"), "'no' is neither true nor false");
  has(with("dtype float32", "dtype float3"), "float3");
  has(with("num_kv_heads 2", "num_kv_heads 3"), "does not divide num_heads");
  has(with("tensor embed float32 0 61 32", "tensor embed float32 0 61 x"), "end with a shape");
  has(with("tensor embed float32 0 61 32", "tensor embed float32 0 60 32"), "embed (1 of 61 rows)");
  has(with("tensor embed float32 0 61 32", "tensor embod float32 0 61 32"), "named embod");
  folder.set_model_text(good);
  std::filesystem::resize_file(folder.path / kWeightsFile, 100);
  has(problem(), "the file ends inside of tensor embed");
  std::filesystem::remove(folder.path / kWeightsFile);
  has(problem(), "there is no");
}

TEST_CASE("a folder that cannot be made is told") {
  const Folder folder;
  folder.set_model_text("in the way");
  const auto weights = random_weights(tiny_spec(1), cpu());
  weights->finish();
  CHECK_THROWS_WITH_AS(write_model(*weights, folder.path / kModelFile / "below"),
                       doctest::Contains("cannot make the folder"), Error);
}
