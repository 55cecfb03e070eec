#pragma once

#include <vector>

namespace nanoflow {

// A plan, and the graph captured from it, serves one padded number of rows: few different ones
// should do for all batches, at the price of few inert rows.

/// What `rows` are padded to: a multiple of `granularity` up to 16 of it, of 2 × granularity up to
/// 32, of 4 × granularity beyond; never more than `limit`. Error for more rows than that.
int bucket_of(int rows, int granularity, int limit);

/// What the rows of each segment are padded to; segments without rows stay empty. As a rule the
/// shares of one bucket of the whole step, whose segments part at the fractions `cuts`, so that
/// balanced batches need no more plans than there are buckets. A batch that would pay for it with
/// over an eighth more rows has a bucket for each segment. The sum exceeds `limit` only where such
/// a batch is nearly full, by less than granularity a segment.
std::vector<int> bucket_segments(const std::vector<int>& rows, const std::vector<double>& cuts,
                                 int granularity, int limit);

}  // namespace nanoflow
