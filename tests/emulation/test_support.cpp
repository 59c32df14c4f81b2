// Child processes for tests.
#include "test_support.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <exception>

namespace emulation {
namespace {

constexpr int kWrongStatus = 3;
constexpr int kErrorStatus = 4;

int run_body(const std::function<bool()>& body) {
  Config defaults;
  defaults.order = config().order;
  defaults.seed = config().seed;
  defaults.threads = config().threads;
  config() = defaults;
  try {
    if (body()) return 0;
    std::fprintf(stderr, "%s\n", kWrongResult.c_str());
    return kWrongStatus;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return kErrorStatus;
  }
}

}  // namespace

Outcome run_in_child(const std::function<bool()>& body) {
  std::array<int, 2> pipe_ends{};
  REQUIRE(pipe(pipe_ends.data()) == 0);
  std::fflush(nullptr);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    dup2(pipe_ends[1], STDOUT_FILENO);
    dup2(pipe_ends[1], STDERR_FILENO);
    close(pipe_ends[0]);
    close(pipe_ends[1]);
    const int status = run_body(body);
    std::fflush(nullptr);
    _exit(status);
  }
  close(pipe_ends[1]);
  std::string output;
  std::array<char, 4096> buffer;
  for (ssize_t n; (n = read(pipe_ends[0], buffer.data(), buffer.size())) > 0;) {
    output.append(buffer.data(), static_cast<size_t>(n));
  }
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), output};
}

void expect_noticed(const std::string& how, const std::function<bool()>& body) {
  const Outcome outcome = run_in_child(body);
  INFO("output of the child: ", outcome.output);
  CHECK(outcome.status != 0);
  CHECK(outcome.output.find(how) != std::string::npos);
}

void expect_noticed_by_asan(const std::string& how, const std::function<bool()>& body) {
  if (kAddressSanitizer) expect_noticed(how, body);
}

}  // namespace emulation
