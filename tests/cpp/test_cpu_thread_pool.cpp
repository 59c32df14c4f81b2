#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <vector>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/thread_pool.h"

namespace frspec::cpu {
namespace {

double process_cpu_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

TEST_CASE("every item is handed out once, in chunks of at least the grain") {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    CHECK(pool.threads() == threads);
    for (int round = 0; round < 300; ++round) {
      const int64_t count = round % 41 * (round % 7 + 1);
      const int64_t grain = 1 + round % 5;
      std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
      std::atomic<int> bad{0};
      std::vector<std::atomic<int>> active(static_cast<size_t>(threads));
      pool.parallel_for(count, grain, [&](int64_t begin, int64_t end, int thread) {
        if (thread < 0 || thread >= threads || begin >= end) ++bad;
        if (end - begin < grain && end != count) ++bad;
        if (active[static_cast<size_t>(thread)].exchange(1) != 0) ++bad;
        for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
        active[static_cast<size_t>(thread)] = 0;
      });
      for (const auto& times : seen) bad += times == 1 ? 0 : 1;
      CHECK(bad == 0);
    }
  }
}

TEST_CASE("more items than a share has numbers for") {
  ThreadPool pool(3);
  for (const int64_t count : {65534, 65535, 65536, 1000003}) {
    std::vector<char> seen(static_cast<size_t>(count));
    std::atomic<int64_t> items{0};
    pool.parallel_for(count, 1, [&](int64_t begin, int64_t end, int) {
      items += end - begin;
      for (int64_t i = begin; i < end; ++i) seen[static_cast<size_t>(i)] = 1;
    });
    CHECK(items == count);
    CHECK(std::count(seen.begin(), seen.end(), 1) == count);
  }
}

TEST_CASE("consecutive regions do not mix, with workers awake and asleep") {
  ThreadPool pool(3);
  int64_t wrong = 0;
  for (int64_t round = 0; round < 20000; ++round) {
    if (round % 2000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    std::atomic<int64_t> sum{0};
    const int64_t count = 2 + round % 9;
    pool.parallel_for(count, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) sum += i + round;
    });
    if (sum != count * (count - 1) / 2 + count * round) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("idle workers sleep") {
  ThreadPool pool(4);
  pool.parallel_for(100, 1, [](int64_t, int64_t, int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double before = process_cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(process_cpu_seconds() - before < 0.05);
}

TEST_CASE("the number of threads is checked") {
  CHECK(usable_threads() >= 1);
  CHECK_THROWS_AS(make_cpu_backend(-1), RequestError);
  CHECK_THROWS_AS(make_cpu_backend(100000), RequestError);
  CHECK(make_cpu_backend(0)->info().name == "cpu");
}

}  // namespace frspec::cpu
