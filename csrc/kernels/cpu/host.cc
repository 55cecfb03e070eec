#include "kernels/cpu/host.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <thread>

#include "core/error.h"

namespace nanoflow::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr int kNoLimit = std::numeric_limits<int>::max();

/// So many whole huge pages, aligned as such; null where there is no room. They go back to the
/// system when they are unmapped, whereas malloc may keep what is freed.
void* map_huge_pages(size_t bytes) {
  const size_t span = bytes + kHugePage;
  void* const start =
      mmap(nullptr, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  auto* const first = static_cast<std::byte*>(start);
  const size_t before = -reinterpret_cast<uintptr_t>(start) % kHugePage;
  if (before > 0) munmap(first, before);
  munmap(first + before + bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
  // Advice: a system without huge pages refuses it, and nothing is lost.
  madvise(first + before, bytes, MADV_HUGEPAGE);
#endif
  return first + before;
}

/// The value of a line "key: value" of a /proc file, empty where there is none.
std::string proc_value(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(key + ":", 0) == 0) return line.substr(key.size() + 1);
  }
  return "";
}

/// Counts a list like "0-3,8".
int count_cores(const std::string& list) {
  std::istringstream text(list);
  int count = 0;
  for (int first; text >> first;) {
    int last = first;
    if (text.peek() == '-') text.ignore() >> last;
    if (text.peek() == ',') text.ignore();
    count += last - first + 1;
  }
  return count;
}

int cores_of_affinity() {
  const int count = count_cores(proc_value("/proc/self/status", "Cpus_allowed_list"));
  return count > 0 ? count : static_cast<int>(std::thread::hardware_concurrency());
}

/// Quota and period in µs of version 2, as a container sees its own group. "max" is no quota.
int cores_of_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (!(file >> quota >> period) || period <= 0) return kNoLimit;
  return static_cast<int>(quota / period + 0.5);
}

}  // namespace

int usable_cores() { return std::max(1, std::min(cores_of_affinity(), cores_of_quota())); }

size_t physical_memory() {
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

size_t available_memory() {
  std::istringstream kib(proc_value("/proc/meminfo", "MemAvailable"));
  if (size_t value = 0; kib >> value) return value << 10;
  return physical_memory();
}

Buffer allocate_memory(size_t bytes) {
  const bool is_large = bytes >= kHugePage;
  const size_t alignment = is_large ? kHugePage : Arena::kAlignment;
  const size_t rounded = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  void* memory = nullptr;
  // A system that overcommits would grant what it can never back.
  if (bytes <= physical_memory()) {
    memory = is_large ? map_huge_pages(rounded) : std::aligned_alloc(alignment, rounded);
  }
  if (memory == nullptr) {
    fail<OutOfMemory>("cannot allocate ", bytes, " bytes of host memory; ", available_memory(),
                      " are available");
  }
  if (is_large) return Buffer(memory, bytes, {}, [rounded](void* p) { munmap(p, rounded); });
  return Buffer(memory, bytes, {}, [](void* p) { std::free(p); });
}

}  // namespace nanoflow::cpu
