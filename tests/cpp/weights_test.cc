#include "model/weights.h"

#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <utility>

#include "away_backend.h"
#include "core/error.h"
#include "kernels/random.h"
#include "tiny_model.h"

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

/// Values that differ from row to row and fit a bfloat16.
std::vector<float> counted_rows(int64_t rows, int64_t columns) {
  std::vector<float> values;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      values.push_back(static_cast<float>((7 * row + column) % 251));
    }
  }
  return values;
}

std::vector<float> values_of(const Tensor& tensor) {
  std::vector<float> values;
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    values.push_back(static_cast<float>(tensor.data<BFloat16>()[i]));
  }
  return values;
}

size_t bytes_of(const std::vector<float>& values) { return values.size() * sizeof(float); }

}  // namespace

TEST_CASE("weights reach host memory and, through pinned buffers, a device") {
  const ModelSpec spec = tiny_spec(1, DType::kBF16);
  for (const std::shared_ptr<Backend>& backend :
       {make_backend({.device = {}, .threads = 2, .isa = "auto"}),
        std::shared_ptr<Backend>(std::make_shared<AwayBackend>())}) {
    Weights weights(spec, backend);
    const std::vector<float> rows = counted_rows(spec.vocab_size, spec.hidden_size);
    const int64_t split = 20, columns = spec.hidden_size;
    const std::vector<float> last(rows.begin() + split * columns, rows.end());
    weights.load("embed", split, last.data(), bytes_of(last), DType::kF32);
    std::vector<BFloat16> first;
    for (int64_t i = 0; i < split * columns; ++i) first.emplace_back(rows[i]);
    weights.load("embed", 0, first.data(), first.size() * sizeof(BFloat16), DType::kBF16);
    for (const Weights::Named& tensor : weights.tensors()) {
      if (tensor.name != "embed") weights.fill_normal(tensor.name, 3, 0.0f, 1.0f);
    }
    weights.finish();
    CHECK(values_of(weights.embed()) == rows);
    const BFloat16 second(static_cast<float>(normal_sum(3, 1)) / kNormalSumStd);
    CHECK(values_of(weights.norm())[1] == static_cast<float>(second));
  }
}

TEST_CASE("weights larger than the pinned buffers pass through them in turn") {
  ModelSpec spec = tiny_spec(1, DType::kBF16);
  spec.vocab_size = 20000;
  spec.hidden_size = 2048;  // an embedding table of 78 MiB, three fillings of a buffer
  const auto backend = std::make_shared<AwayBackend>();
  Weights weights(spec, backend);
  std::vector<float> rows = counted_rows(spec.vocab_size, spec.hidden_size);
  weights.load("embed", 0, rows.data(), bytes_of(rows), DType::kF32);
  const std::vector<float> expected = rows;
  std::fill(rows.begin(), rows.end(), -1.0f);  // the source is free after load()
  CHECK_THROWS_AS(weights.finish(), Error);    // the other tensors are missing
  CHECK(values_of(weights.embed()) == expected);
}

TEST_CASE("rows of gate and up go to their groups, in pieces of any size") {
  const ModelSpec spec = tiny_spec(1, DType::kBF16);
  const int columns = spec.hidden_size;
  const std::vector<float> gate = counted_rows(48, columns);
  std::vector<float> up = gate;
  for (float& value : up) value = -value;
  for (const std::shared_ptr<Backend>& backend :
       {make_backend({.device = {}, .threads = 2, .isa = "auto"}),
        std::shared_ptr<Backend>(std::make_shared<AwayBackend>())}) {
    Weights weights(spec, backend);
    weights.load("layers.0.gate", 0, gate.data(), bytes_of(gate), DType::kF32);
    for (const auto& [begin, end] : {std::pair{20, 48}, {0, 3}, {3, 7}, {7, 20}}) {
      const std::vector<float> piece(up.begin() + begin * columns, up.begin() + end * columns);
      weights.load("layers.0.up", begin, piece.data(), bytes_of(piece), DType::kF32);
    }
    CHECK_THROWS_AS(weights.finish(), Error);  // the other tensors are missing
    std::vector<float> expected;
    for (int group = 0; group < 48; group += 8) {
      for (const auto* part : std::array<const std::vector<float>*, 2>{&gate, &up}) {
        expected.insert(expected.end(), part->begin() + group * columns,
                        part->begin() + (group + 8) * columns);
      }
    }
    CHECK(values_of(weights.layer(0).gate_up) == expected);
    CHECK_THROWS_WITH_AS(
        weights.load("layers.0.up", 47, up.data(), 2 * columns * sizeof(float), DType::kF32),
        "weight layers.0.up has 48 rows, not rows [47, 49)", Error);
  }
}

TEST_CASE("the projection of q, k and v has a bias where the spec says so") {
  ModelSpec spec = tiny_spec(2);
  const auto backend = make_backend({.device = {}, .threads = 1, .isa = "auto"});
  CHECK_FALSE(Weights(spec, backend).layer(1).qkv_bias);
  spec.qkv_bias = true;
  const Weights weights(spec, backend);
  CHECK(weights.layer(1).qkv_bias.size(0) == spec.qkv_size());
  CHECK(weights.layer(1).input_norm.size(0) == spec.hidden_size);
  CHECK(weights.norm().size(0) == spec.hidden_size);
}

TEST_CASE("an intermediate size that leaves part of a group is refused") {
  ModelSpec spec = tiny_spec();
  spec.intermediate_size = 44;
  CHECK_THROWS_WITH_AS(spec.check(), "model spec: intermediate_size 44 is no multiple of 8", Error);
}

TEST_CASE("runs of rows are filled in the order of the source") {
  const auto backend = std::make_shared<AwayBackend>();
  const Buffer memory = backend->allocate(12 * sizeof(float));
  const Tensor target(memory.data(), DType::kF32, memory.device(), {6, 2});
  std::memset(memory.data(), 0, memory.bytes());
  Uploader uploader(*backend);
  const std::vector<float> rows = {1, 2, 3, 4, 5, 6, 7, 8};
  uploader.write(target, {{.from = 0, .row = 4, .count = 1}, {.from = 1, .row = 0, .count = 3}},
                 {.data = rows.data(), .dtype = DType::kF32, .stride = 2});
  uploader.finish();
  const auto* values = target.data<float>();
  CHECK(std::vector<float>(values, values + 12) ==
        std::vector<float>{3, 4, 5, 6, 7, 8, 0, 0, 1, 2, 0, 0});
}

TEST_CASE("what does not fit a weight is refused") {
  Weights weights(tiny_spec(1), make_backend({.device = {}, .threads = 1, .isa = "auto"}));
  const std::vector<float> row(32, 1.0f);
  CHECK_THROWS_WITH_AS(weights.load("layers.0.wq", 0, row.data(), 4, DType::kF32),
                       "the model has no weight named layers.0.wq", Error);
  CHECK_THROWS_WITH_AS(weights.load("embed", 61, row.data(), bytes_of(row), DType::kF32),
                       "weight embed has 61 rows, not rows [61, 62)", Error);
  CHECK_THROWS_WITH_AS(weights.load("embed", 0, row.data(), 12, DType::kF32),
                       "weight embed has 32 columns of float32; 12 bytes are not whole rows of 128",
                       Error);
  CHECK_THROWS_AS(weights.load("embed", 0, row.data(), bytes_of(row), DType::kI32), Error);
  CHECK_THROWS_AS(weights.fill_normal("head", 0, 0.0f, 1.0f), Error);
  CHECK_THROWS_WITH_AS(weights.fill_normal("layers.0.up", 0, 0.0f, 1.0f),
                       "weight layers.0.up is only a part of layers.0.gate_up; fill that", Error);
}
