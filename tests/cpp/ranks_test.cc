#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tiny_model.h"

// The ranks of one process on the CPU: collectives, and what becomes of the others when one fails.

using namespace nanoflow;
using namespace nanoflow::testing;

namespace {

std::vector<std::shared_ptr<Backend>> cpu_ranks(int ranks) {
  return make_backends({.device = {}, .threads = 2 * ranks, .isa = "generic"}, ranks);
}

/// A model that four ranks can share; two of them hold the same KV head.
ModelSpec rank_spec() {
  ModelSpec spec = tiny_spec(2);
  spec.intermediate_size = 64;
  return spec;
}

/// One rank's lane and an event at the end of what it was given.
struct Rank {
  explicit Rank(std::shared_ptr<Backend> own)
      : backend(std::move(own)), lane(backend->make_lane(2)), done(backend->make_event()) {}

  void all_reduce(std::vector<float>& values) {
    const Tensor x(values.data(), DType::kF32, {}, {1, static_cast<int64_t>(values.size())});
    backend->kernels().run(AllReduce{.x = x}, *lane);
  }
  void finish() {
    lane->record(*done);
    done->synchronize();
  }

  std::shared_ptr<Backend> backend;
  std::unique_ptr<Lane> lane;
  std::unique_ptr<Event> done;
};

std::vector<std::unique_ptr<Rank>> make_ranks(int count) {
  std::vector<std::unique_ptr<Rank>> ranks;
  for (const auto& backend : cpu_ranks(count)) ranks.push_back(std::make_unique<Rank>(backend));
  return ranks;
}

/// A rank that fails in its second step: `on_lane` while the step runs, else while it is issued.
class FailingBackend : public Backend {
 public:
  FailingBackend(std::shared_ptr<Backend> own, bool on_lane)
      : own_(std::move(own)), on_lane_(on_lane) {}

  Device device() const override { return own_->device(); }
  std::string description() const override { return own_->description(); }
  int width() const override { return own_->width(); }
  int row_granularity() const override { return own_->row_granularity(); }
  size_t total_memory() const override { return own_->total_memory(); }
  size_t free_memory() const override { return own_->free_memory(); }
  Buffer allocate(size_t bytes) override { return own_->allocate(bytes); }
  Buffer allocate_host(size_t bytes) override { return own_->allocate_host(bytes); }
  std::unique_ptr<Lane> make_lane(int width) override { return own_->make_lane(width); }
  std::unique_ptr<Event> make_event() override { return own_->make_event(); }
  /// Called once for the rope table, and once a step.
  void copy(void* to, const void* from, size_t bytes, Lane& lane) override {
    own_->copy(to, from, bytes, lane);
    if (++copies_ != 3) return;
    const auto trouble = [] { throw Error("rank 1 has lost its memory"); };
    if (!on_lane_) trouble();
    lane.notify([trouble](std::exception_ptr) { trouble(); });
  }
  Kernels& kernels() override { return own_->kernels(); }
  Communicator& communicator() override { return own_->communicator(); }

 private:
  std::shared_ptr<Backend> own_;
  bool on_lane_;
  int copies_ = 0;
};

}  // namespace

TEST_CASE("a rank that fails ends the engine with its cause") {
  for (bool on_lane : {false, true}) {
    const ModelSpec spec = rank_spec();
    std::vector<std::shared_ptr<Backend>> backends = cpu_ranks(2);
    backends[1] = std::make_shared<FailingBackend>(backends[1], on_lane);
    std::vector<std::shared_ptr<Weights>> weights;
    for (const auto& backend : backends) weights.push_back(random_weights(spec, backend));
    Engine engine(tiny_config(), weights, pingpong(1, 1));
    const Batch batch = prompt_batch({5, 3, 9, 2}, 2, 4, spec.vocab_size);
    CHECK(engine.submit(batch).wait().tokens.size() == 4);
    CHECK_THROWS_WITH_AS(engine.submit(batch).wait(), "rank 1 has lost its memory", Error);
    CHECK(engine.completed_steps() == 2);
    CHECK_THROWS_WITH_AS(engine.submit(batch), "rank 1 has lost its memory", Error);
  }
}

TEST_CASE("weights of the wrong ranks are refused") {
  const ModelSpec spec = rank_spec();
  std::vector<std::shared_ptr<Weights>> weights;
  for (const auto& backend : cpu_ranks(2)) weights.push_back(random_weights(spec, backend));
  std::swap(weights[0], weights[1]);
  CHECK_THROWS_WITH_AS(Engine(tiny_config(), weights, sequential(2)),
                       "the engine was given 2 weights, the one at 0 of rank 1 of 2", Error);
  Schedule schedule = pingpong(1, 1);
  schedule.stages["o"].gather = {1};
  std::swap(weights[0], weights[1]);
  CHECK_THROWS_WITH_AS(Engine(tiny_config(), weights, schedule),
                       "a schedule that gathers attention outputs needs weights made for it",
                       Error);
}

TEST_CASE("sums are taken in the order of ranks, and are the same on all") {
  const auto ranks = make_ranks(4);
  constexpr size_t kCount = 1000;
  std::vector<std::vector<float>> values;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (size_t r = 0; r < ranks.size(); ++r) {
    values.emplace_back(kCount);
    for (float& value : values[r]) value = normal(random);
  }
  std::vector<float> expected(kCount);
  for (const auto& own : values) {
    for (size_t i = 0; i < kCount; ++i) expected[i] += own[i];
  }
  for (size_t r = ranks.size(); r-- > 0;) ranks[r]->all_reduce(values[r]);
  for (const auto& rank : ranks) rank->finish();
  for (const auto& own : values) CHECK(own == expected);
}

TEST_CASE("ranks that run different collectives are told so") {
  const auto ranks = make_ranks(2);
  std::vector<float> shorter(4), longer(5);
  ranks[0]->all_reduce(shorter);
  ranks[1]->all_reduce(longer);
  CHECK_THROWS_WITH_AS(ranks[0]->finish(),
                       doctest::Contains("ranks do not agree: one runs all_reduce of float32[1, "),
                       Error);
  CHECK_THROWS_AS(ranks[1]->finish(), Error);
}

TEST_CASE("ranks that do not all norm a sum are told so") {
  const auto ranks = make_ranks(2);
  std::vector<float> values(4), others(4), normed(4), weight(4);
  ranks[0]->all_reduce(values);
  AllReduce norming{.x = Tensor(others.data(), DType::kF32, {}, {1, 4})};
  norming.norm = RmsNorm{.x = norming.x,
                         .out = Tensor(normed.data(), DType::kF32, {}, {1, 4}),
                         .weight = Tensor(weight.data(), DType::kF32, {}, {4}),
                         .eps = 1e-5f};
  ranks[1]->backend->kernels().run(norming, *ranks[1]->lane);
  CHECK_THROWS_WITH_AS(ranks[0]->finish(), doctest::Contains(", normed"), Error);
  CHECK_THROWS_AS(ranks[1]->finish(), Error);
}

TEST_CASE("a lane that fails ends the collectives of all ranks with its error") {
  const auto ranks = make_ranks(3);
  const auto failing = ranks[1]->backend->make_event();
  const auto source = ranks[1]->backend->make_lane(1);
  source->notify([](std::exception_ptr) { throw Error("the second rank's trouble"); });
  source->record(*failing);
  ranks[1]->lane->wait(*failing);
  std::vector<std::vector<float>> values(3, std::vector<float>(64, 1.0f));
  for (size_t r = 0; r < 3; ++r) {
    ranks[r]->all_reduce(values[r]);
    ranks[r]->all_reduce(values[r]);
  }
  for (const auto& rank : ranks) {
    CHECK_THROWS_WITH_AS(rank->finish(), "the second rank's trouble", Error);
  }
}

TEST_CASE("a rank that never comes does not hold the others once the group is aborted") {
  const auto ranks = make_ranks(2);
  std::vector<float> values(8, 1.0f);
  ranks[0]->all_reduce(values);
  Communicator& other = ranks[1]->backend->communicator();
  other.abort(std::make_exception_ptr(Error("gone")));
  CHECK_THROWS_WITH_AS(ranks[0]->finish(), "gone", Error);
  CHECK(other.cause() != nullptr);
}

TEST_CASE("what does not divide among ranks is refused by name") {
  ModelSpec spec = tiny_spec(1);
  CHECK_THROWS_WITH_AS(spec.shard(0, 3),
                       "tensor_parallel_size 3 does not divide num_heads 4; choose one that does",
                       Error);
  spec.intermediate_size = 40;
  CHECK_THROWS_WITH_AS(
      spec.shard(0, 2),
      "tensor_parallel_size 2 leaves a rank 20 of intermediate_size 40, no multiple of 8", Error);
  spec = tiny_spec(1);
  spec.num_heads = 6;
  spec.num_kv_heads = 3;
  spec.intermediate_size = 96;
  spec.hidden_size = 48;
  CHECK_THROWS_WITH_AS(spec.shard(0, 6),
                       "tensor_parallel_size 6 leaves a rank no row of vocab_size 61", Error);
  spec.vocab_size = 96;
  CHECK_THROWS_WITH_AS(spec.shard(0, 6).shard(0, 1),
                       "model spec: rank 0 of 1, of a part for rank 0 of 6", Error);
  CHECK_THROWS_WITH_AS(
      spec.shard(1, 2),
      "tensor_parallel_size 2 does not divide num_kv_heads 3; choose one that does", Error);
  CHECK(spec.shard(4, 6).kv_replicas == 2);
}

TEST_CASE("weights that are filled at random are parts of one model") {
  const ModelSpec spec = rank_spec();
  const auto whole = std::make_shared<Weights>(spec, cpu_ranks(1).front());
  for (const auto& tensor : whole->tensors()) whole->fill_normal(tensor.name, 5, 0.0f, 1.0f);
  whole->finish();
  for (const auto& backend : cpu_ranks(4)) {
    Weights part(spec, backend, true);
    for (const auto& tensor : part.tensors()) part.fill_normal(tensor.name, 5, 0.0f, 1.0f);
    part.finish();
    const int rank = part.spec().rank;
    const Weights::Layer own = part.layer(1), all = whole->layer(1);
    const auto same = [](const Tensor& a, const Tensor& b) {
      bool equal = a.size(0) == b.size(0) && a.size(1) == b.size(1);
      for (int64_t row = 0; equal && row < a.size(0); ++row) {
        equal =
            std::equal(a.select(0, row).data<float>(), a.select(0, row).data<float>() + a.size(1),
                       b.select(0, row).data<float>());
      }
      return equal;
    };
    CHECK(same(own.o, all.o.slice_columns(rank * 8, rank * 8 + 8)));
    CHECK(same(own.o_columns, all.o.slice_rows(rank * 8, rank * 8 + 8)));
    CHECK(same(own.down, all.down.slice_columns(rank * 16, rank * 16 + 16)));
    CHECK(same(own.qkv.slice_rows(0, 8), all.qkv.slice_rows(rank * 8, rank * 8 + 8)));
    const int64_t key = 32 + rank / 2 * 8;  // two ranks share a KV head
    CHECK(same(own.qkv.slice_rows(8, 16), all.qkv.slice_rows(key, key + 8)));
    CHECK(same(own.qkv.slice_rows(16, 24), all.qkv.slice_rows(key + 16, key + 24)));
    const int64_t first = part.spec().vocab_begin();
    CHECK(same(part.lm_head(), whole->lm_head().slice_rows(first, part.spec().vocab_end())));
  }
}
