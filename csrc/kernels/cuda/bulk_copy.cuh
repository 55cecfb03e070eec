#pragma once

#include <cuda.h>

#include <cstdint>

// Bulk tensor copies of Hopper into shared memory, and the barriers that tell of them.

namespace nanoflow::cuda {

/// For `arrivals` threads a phase; followed by a fence before others use it.
__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// Makes what the calling thread wrote to shared memory visible to bulk copies and products of
/// warpgroups.
__device__ inline void fence_for_async_reads() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// The same, and initialised barriers.
__device__ inline void fence_for_bulk_copies() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_for_async_reads();
}

/// Arrives, with so many bytes still to come in this phase.
__device__ inline void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Until the phase of this parity is over.
__device__ inline void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/// Waits for so many threads that name this barrier of the CTA; 0 is __syncthreads's.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// An access policy for what is read once: it leaves the cache first.
__device__ inline uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Copies the map's box at these coordinates to shared memory; the barrier is told of its bytes.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int key,
                                int head, int page, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %3, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(0), "r"(key), "r"(head), "r"(page), "l"(policy)
      : "memory");
}

/// The same for a map whose boxes hold one `half` of 64 dimensions, and what is read again.
__device__ inline void copy_half(uint32_t to, const CUtensorMap& map, uint32_t barrier, int key,
                                 int half, int head, int page) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(0), "r"(key), "r"(half), "r"(head), "r"(page)
      : "memory");
}

/// Copies bytes; all are multiples of 16.
__device__ inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace nanoflow::cuda
