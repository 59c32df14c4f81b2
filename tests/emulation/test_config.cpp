// The configuration from the environment.
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <string>

#include "test_support.h"

namespace emulation {
namespace {

// Run by the next test in a process of its own.
TEST_CASE("configuration as the environment says" * doctest::skip()) {
  CHECK(config().order == Order::kRandom);
  CHECK(config().seed == 17);
  CHECK(config().copies == Copies::kEager);
  CHECK(config().streams == Streams::kImmediate);
  CHECK(config().kernel_errors == KernelErrors::kSticky);
  CHECK(config().threads == 3);
  CHECK(config().device_bytes == 12345);
  CHECK(config().compute_major == 12);
  CHECK(config().shared_bytes_per_block == 99 << 10);
  void* p = nullptr;
  check(cudaMalloc(&p, 1), "first");
  CHECK(cudaMalloc(&p, 1) == cudaErrorMemoryAllocation);
}

Outcome run_with(const std::string& settings) {
  std::array<char, 4096> path{};
  REQUIRE(readlink("/proc/self/exe", path.data(), path.size() - 1) > 0);
  return run_in_child([&] {
    const std::string command = "env " + settings + " '" + path.data() +
                                "' --no-skip --test-case='configuration as the environment says'";
    return std::system(command.c_str()) == 0;
  });
}

TEST_CASE("configuration from the environment") {
  const std::string good =
      "FRSPEC_EMULATION_ORDER=random:17 FRSPEC_EMULATION_COPIES=eager "
      "FRSPEC_EMULATION_STREAMS=immediate FRSPEC_EMULATION_ERRORS=sticky "
      "FRSPEC_EMULATION_THREADS=3 FRSPEC_EMULATION_DEVICE_BYTES=12345 "
      "FRSPEC_EMULATION_COMPUTE=12.0 FRSPEC_EMULATION_FAIL=cudaMalloc:2:1";
  const Outcome read = run_with(good);
  INFO(read.output);
  CHECK(read.status == 0);
  const Outcome refused = run_with(good + " FRSPEC_EMULATION_ORDER=sideways");
  CHECK(refused.status != 0);
  CHECK(refused.output.find("found 'sideways'") != std::string::npos);
}

}  // namespace
}  // namespace emulation
