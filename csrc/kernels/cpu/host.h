#pragma once

#include <cstddef>

#include "core/arena.h"

namespace nanoflow::cpu {

/// Cores this process may use: its affinity mask and its cgroup's CPU quota, at least 1.
int usable_cores();

/// Bytes of the machine.
size_t physical_memory();

/// Bytes that can be allocated without swapping.
size_t available_memory();

/// Memory that is committed when first touched. Large buffers lie on huge pages where the system
/// has them.
Buffer allocate_memory(size_t bytes);

}  // namespace nanoflow::cpu
