#pragma once

#include "core/arena.h"
#include "kernels/backend.h"
#include "model/spec.h"

namespace nanoflow {

/// The page pool of one rank: one buffer [layer, page, K/V, Hkv, page_size, D]. A page holds
/// page_size tokens of one request in every layer; which request is data of each batch.
class KvCache {
 public:
  KvCache(const ModelSpec& spec, Backend& backend, int num_pages, int page_size);

  int num_pages() const { return num_pages_; }
  int page_size() const { return page_size_; }
  int num_layers() const { return spec_.num_layers; }
  Tensor k(int layer) const { return view(layer, 0); }  // [P, Hkv, page_size, D]
  Tensor v(int layer) const { return view(layer, 1); }  // [P, Hkv, page_size, D]

  /// Of all layers.
  size_t page_bytes() const { return page_bytes(spec_, page_size_); }
  static size_t page_bytes(const ModelSpec& spec, int page_size);
  /// Where a page of a layer begins: one run of page_bytes() / num_layers() bytes.
  std::byte* page(int layer, int page) const;

 private:
  std::byte* layer_data(int layer) const;
  Tensor view(int layer, int k_or_v) const;

  ModelSpec spec_;
  int num_pages_, page_size_;
  Buffer buffer_;
};

}  // namespace nanoflow
