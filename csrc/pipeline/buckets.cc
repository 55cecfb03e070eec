#include "pipeline/buckets.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"

namespace nanoflow {
namespace {

constexpr int kFine = 16;      // granules up to which buckets are one apart
constexpr int kMedium = 32;    // granules up to which they are two apart
constexpr int kMostExtra = 8;  // one row in so many may be added for a shared bucket

int sum(const std::vector<int>& values) { return std::accumulate(values.begin(), values.end(), 0); }

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

/// Rows of each segment of a step with `rows` rows, as the scheduler deals them.
std::vector<int> shares_of(int rows, const std::vector<double>& cuts) {
  std::vector<int> shares;
  int begin = 0;
  for (double cut : cuts) {
    const int end = static_cast<int>(std::nearbyint(cut * rows));
    shares.push_back(end - begin);
    begin = end;
  }
  shares.push_back(rows - begin);
  return shares;
}

bool fits(const std::vector<int>& rows, const std::vector<int>& shares) {
  return std::equal(rows.begin(), rows.end(), shares.begin(), std::less_equal<>());
}

}  // namespace

int bucket_of(int rows, int granularity, int limit) {
  NF_CHECK(rows >= 0 && rows <= limit, rows, " rows do not fit: the engine has room for ", limit);
  int step = granularity;
  if (rows > kFine * granularity) step = 2 * granularity;
  if (rows > kMedium * granularity) step = 4 * granularity;
  return std::min(round_up(rows, step), limit);
}

std::vector<int> bucket_segments(const std::vector<int>& rows, const std::vector<double>& cuts,
                                 int granularity, int limit) {
  NF_CHECK(rows.size() == cuts.size() + 1, "there are ", cuts.size() + 1, " segments, not ",
           rows.size());
  std::vector<int> own(rows);
  for (int& padded : own) padded = bucket_of(padded, granularity, limit);
  int bucket = bucket_of(sum(rows), granularity, limit);
  while (bucket < limit && !fits(rows, shares_of(bucket, cuts))) {
    bucket = bucket_of(bucket + 1, granularity, limit);
  }
  std::vector<int> shared = shares_of(bucket, cuts);
  if (fits(rows, shared)) {
    for (size_t s = 0; s < rows.size(); ++s) {
      if (rows[s] == 0) shared[s] = 0;
    }
    if (sum(shared) <= sum(own) + sum(own) / kMostExtra) return shared;
  }
  if (sum(own) <= limit) return own;
  for (size_t s = 0; s < rows.size(); ++s) own[s] = round_up(rows[s], granularity);
  return own;
}

}  // namespace nanoflow
