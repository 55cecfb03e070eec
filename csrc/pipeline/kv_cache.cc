#include "pipeline/kv_cache.h"

#include "core/error.h"

namespace nanoflow {

KvCache::KvCache(const ModelSpec& spec, Backend& backend, int num_pages, int page_size)
    : spec_(spec), num_pages_(num_pages), page_size_(page_size) {
  NF_CHECK(num_pages >= 1 && page_size >= 1,
           "the KV cache needs at least one page of one token, not ", num_pages, " pages of ",
           page_size);
  buffer_ = backend.allocate(page_bytes(spec, page_size) * static_cast<size_t>(num_pages));
}

size_t KvCache::page_bytes(const ModelSpec& spec, int page_size) {
  return spec.kv_bytes_per_token() * static_cast<size_t>(page_size);
}

std::byte* KvCache::layer_data(int layer) const {
  NF_CHECK(0 <= layer && layer < spec_.num_layers, "layer ", layer, " of ", spec_.num_layers);
  const size_t layer_bytes = buffer_.bytes() / static_cast<size_t>(spec_.num_layers);
  return buffer_.data() + layer_bytes * static_cast<size_t>(layer);
}

std::byte* KvCache::page(int layer, int page) const {
  NF_CHECK(0 <= page && page < num_pages_, "page ", page, " of ", num_pages_);
  const size_t bytes = page_bytes() / static_cast<size_t>(spec_.num_layers);
  return layer_data(layer) + bytes * static_cast<size_t>(page);
}

Tensor KvCache::view(int layer, int k_or_v) const {
  const Tensor pages(layer_data(layer), spec_.dtype, buffer_.device(),
                     {num_pages_, 2, spec_.num_kv_heads, page_size_, spec_.head_dim});
  return pages.select(1, k_or_v);
}

}  // namespace nanoflow
