#include "pipeline/buckets.h"

#include <doctest/doctest.h>

#include <numeric>
#include <random>
#include <set>

#include "core/error.h"

using namespace nanoflow;

namespace {

using Rows = std::vector<int>;

int sum(const Rows& rows) { return std::accumulate(rows.begin(), rows.end(), 0); }

}  // namespace

TEST_CASE("buckets are a granule apart, then two, then four, and end at the limit") {
  std::set<int> buckets;
  for (int rows = 1; rows <= 4096; ++rows) {
    const int bucket = bucket_of(rows, 64, 4096);
    const int apart = rows <= 1024 ? 64 : rows <= 2048 ? 128 : 256;
    CHECK(bucket >= rows);
    CHECK(bucket < rows + apart);
    CHECK(bucket % apart == 0);
    if (rows <= 2048) buckets.insert(bucket);
  }
  CHECK(buckets.size() == 16 + 8);
  CHECK(bucket_of(0, 64, 2048) == 0);
  CHECK(bucket_of(1990, 64, 2000) == 2000);
  CHECK(bucket_of(7, 1, 100) == 7);
  CHECK_THROWS_WITH_AS(bucket_of(2049, 64, 2048),
                       "2049 rows do not fit: the engine has room for 2048", Error);
}

TEST_CASE("segments share a bucket where they are balanced") {
  CHECK(bucket_segments({300}, {}, 64, 2048) == Rows{320});
  CHECK(bucket_segments({300, 300}, {0.5}, 64, 2048) == Rows{320, 320});
  CHECK(bucket_segments({256, 257}, {0.5}, 64, 2048) == Rows{288, 288});
  CHECK(bucket_segments({3, 2}, {0.5}, 64, 2048) == Rows{32, 32});
  CHECK(bucket_segments({100, 300}, {0.25}, 64, 2048) == Rows{112, 336});
  CHECK(bucket_segments({40, 0}, {0.5}, 64, 2048) == Rows{64, 0});
  CHECK(bucket_segments({0, 40, 0, 41}, {0.25, 0.5, 0.75}, 64, 2048) == Rows{0, 48, 0, 48});
}

TEST_CASE("segments have a bucket each where sharing one would cost much") {
  CHECK(bucket_segments({500, 1}, {0.5}, 64, 2048) == Rows{512, 64});
  CHECK(bucket_segments({1, 1500}, {0.5}, 64, 2048) == Rows{64, 1536});
  CHECK_THROWS_AS(bucket_segments({500}, {0.5}, 64, 2048), Error);
}

TEST_CASE("a full step is not padded beyond the limit") {
  for (double cut : {0.5, 0.3, 0.371}) {
    const int first = static_cast<int>(std::nearbyint(cut * 2048));
    CHECK(bucket_segments({first, 2048 - first}, {cut}, 64, 2048) == Rows{first, 2048 - first});
  }
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    Rows rows;
    for (int left = 2048, s = 0; s < 3; ++s) {
      rows.push_back(static_cast<int>(random() % static_cast<unsigned>(left + 1)));
      left -= rows.back();
    }
    const Rows padded = bucket_segments(rows, {0.25, 0.5}, 64, 2048);
    for (size_t s = 0; s < rows.size(); ++s) {
      CHECK(padded[s] >= rows[s]);
      CHECK((padded[s] > 0) == (rows[s] > 0));
    }
    CHECK(sum(padded) < 2048 + 3 * 64);
  }
}

TEST_CASE("steps of mixed prefills and decodes need few plans") {
  std::mt19937 random(5);
  for (const std::vector<double>& cuts : {std::vector<double>{}, {0.5}, {0.25, 0.5, 0.75}}) {
    const int segments = static_cast<int>(cuts.size()) + 1;
    std::set<Rows> keys;
    for (int step = 0; step < 20000; ++step) {
      const int decodes = static_cast<int>(random() % 513);
      const int prefill = static_cast<int>(random() % 1537);
      Rows rows(static_cast<size_t>(segments), 0);
      for (int i = 0; i < decodes + prefill; ++i) ++rows[static_cast<size_t>(i % segments)];
      keys.insert(bucket_segments(rows, cuts, 64, 2048));
    }
    CHECK(keys.size() <= 24);
  }
  std::set<int> heads;
  for (int samples = 1; samples <= 512; ++samples) heads.insert(bucket_of(samples, 64, 512));
  CHECK(heads.size() <= 8);
}
