#pragma once

#include <cstdint>
#include <vector>

namespace nanoflow {

/// A stretch of something that ops read and write: bytes of memory, or rows of a layer's KV cache
/// (page numbers are data, so KV hazards are told by the rows whose keys and values they hold).
struct Region {
  static constexpr int64_t kMemory = -1;

  int64_t space;  // kMemory, or the layer whose KV cache it is
  uint64_t begin, end;

  bool overlaps(const Region& other) const {
    return space == other.space && begin < other.end && other.begin < end;
  }
  bool contains(const Region& other) const {
    return space == other.space && begin <= other.begin && other.end <= end;
  }
};

using Regions = std::vector<Region>;

/// A row interval of the step, as a key into a layer's KV cache.
struct KvRows {
  int layer;
  int64_t begin, end;  // rows of the padded step
};

}  // namespace nanoflow
