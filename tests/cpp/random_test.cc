#include "kernels/random.h"

#include <doctest/doctest.h>

namespace nanoflow {
namespace {

using Words = std::array<uint32_t, 4>;

TEST_CASE("philox gives its authors' known answers") {
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  constexpr uint32_t kOnes = 0xffffffff;
  CHECK(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
        Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("uniform numbers depend on the whole seed and stay below one") {
  CHECK(uniform(1, 0) != uniform(uint64_t{1} << 32, 0));
  CHECK(uniform(1, 0) != uniform(1, 1));
  double lowest = 1, highest = 0;
  for (uint32_t counter = 0; counter < 10000; ++counter) {
    const double u = uniform(7, counter);
    lowest = u < lowest ? u : lowest;
    highest = u > highest ? u : highest;
  }
  CHECK(lowest >= 0.0);
  CHECK(lowest < 1e-3);
  CHECK(highest < 1.0);
  CHECK(highest > 1 - 1e-3);
}

}  // namespace
}  // namespace nanoflow
