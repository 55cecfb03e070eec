#pragma once

#include <filesystem>
#include <memory>

#include "kernels/backend.h"
#include "model/spec.h"
#include "model/weights.h"

namespace nanoflow {

/// A model as C++ reads it: a folder with model.txt and weights.bin, written by `nanoflow
/// export-spec`. A line of model.txt is a word and what belongs to it, separated by spaces:
///
///     nanoflow-model 1                              version of the format, first
///     hidden_size 576                               a field of ModelSpec; all are there
///     rope_inv_freq 1 0.749 ...                     one that is a list
///     tensor layers.0.o bfloat16 4096 576 576       name, dtype, byte in weights.bin, shape
///
/// weights.bin holds the tensors of Weights, each contiguous, as the machine stores numbers.
inline constexpr const char* kModelFile = "model.txt";
inline constexpr const char* kWeightsFile = "weights.bin";

/// Writes complete weights that lie in host memory; makes the folder. model.txt comes last, so that
/// a folder that has one is whole. Throws Error where a file cannot be written.
void write_model(const Weights& weights, const std::filesystem::path& folder);

/// Throws Error naming the file, the line and what is wrong with it.
ModelSpec read_spec(const std::filesystem::path& folder);
/// The folder's weights in the backend's memory. Throws Error as read_spec(), and where weights.bin
/// is cut short.
std::shared_ptr<Weights> read_weights(const std::filesystem::path& folder,
                                      std::shared_ptr<Backend> backend);

}  // namespace nanoflow
