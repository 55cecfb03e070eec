#pragma once

#include <functional>
#include <memory>

#include "kernels/backend.h"

namespace nanoflow::cuda {

/// Captures the stream of `origin` and those that fork from it, for calls of this thread alone, and
/// makes the graph ready to launch. Lanes of partitions keep their SMs in it. Error when `enqueue`
/// throws or does what cannot be captured; the lanes are as before.
std::unique_ptr<Graph> capture_graph(Lane& origin, const std::function<void()>& enqueue);

}  // namespace nanoflow::cuda
