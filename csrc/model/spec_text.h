#pragma once

#include <string>
#include <string_view>

#include "model/spec.h"

namespace nanoflow {

/// All fields of a spec, one a line: name, space, value. Numbers read back as the same bits.
std::string to_text(const ModelSpec& spec);

/// The fields read so far from lines as to_text() writes them.
class SpecReader {
 public:
  /// Throws Error on a field that there is not, one given twice, and a value that is no such value.
  void read(std::string_view name, std::string_view value);
  /// Throws Error naming the fields that are missing, or what makes no sense.
  ModelSpec finish() const;

 private:
  ModelSpec spec_;
  std::string seen_ = " ";  // names, each between spaces
};

}  // namespace nanoflow
