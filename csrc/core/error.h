#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace nanoflow {

/// Every failure the library reports. The message says what was wrong, the values, and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A device or host has not the memory that was asked for.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

template <typename Kind = Error, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Kind(message.str());
}

}  // namespace nanoflow

/// NF_CHECK(begin <= end, "rows [", begin, ", ", end, ") are reversed") throws Error when false.
#define NF_CHECK(condition, ...)     \
  do {                               \
    if (!(condition)) [[unlikely]] { \
      ::nanoflow::fail(__VA_ARGS__); \
    }                                \
  } while (false)
