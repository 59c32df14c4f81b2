#include "cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <string>
#include <system_error>

#include "check.h"
#include "cpu/host_memory.h"

namespace frspec::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// How long an idle worker spins before it sleeps, and the caller before it yields.
constexpr std::chrono::microseconds kSpinTime{50};
constexpr uint32_t kNoItem = 0xffffffffu;

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until ready() or until the time is over; whether ready() came true.
template <typename Ready>
bool spin_until(const Ready& ready) {
  const Clock::time_point end = Clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
  } while (Clock::now() < end);
  return false;
}

// The first item of a share: shares are whole grains, as even as can be.
int64_t share_begin(int64_t share, int64_t shares, int64_t count, int64_t grain) {
  const int64_t grains = (count + grain - 1) / grain;
  return std::min(count, grains * share / shares * grain);
}

// CPUs that the quota of the process's cgroups allows, rounded up; a large number without a quota.
int quota_threads() {
  int allowed = 1 << 16;
  for (const std::string& folder : cgroup_folders("cpu")) {
    double quota = -1;
    double period = 0;
    std::ifstream unified(folder + "/cpu.max");
    std::string text;
    if (unified >> text >> period) {
      if (text != "max") quota = std::stod(text);
    } else {
      std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
      std::ifstream(folder + "/cpu.cfs_period_us") >> period;
    }
    if (quota > 0 && period > 0) {
      allowed = std::min(allowed, std::max(1, static_cast<int>((quota + period - 1) / period)));
    }
  }
  return allowed;
}

}  // namespace

int usable_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int count = 0;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) count = CPU_COUNT(&set);
  if (count <= 0) count = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return std::min(count, quota_threads());
}

ThreadPool::ThreadPool(int threads)
    : shares_(std::make_unique<Share[]>(static_cast<size_t>(threads))),
      oversubscribed_(threads > usable_threads()) {
  try {
    workers_.reserve(static_cast<size_t>(threads - 1));
    for (int thread = 1; thread < threads; ++thread) {
      workers_.emplace_back([this, thread] { worker_loop(thread); });
    }
  } catch (const std::system_error& error) {
    const size_t started = workers_.size() + 1;
    stop();
    throw DeviceError(
        concat("cannot start ", threads, " threads, only ", started, ": ", error.what()));
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_.store(true);
  region_.fetch_add(1);
  region_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::run(int64_t count, int64_t grain, Invoke invoke, const void* context) {
  const uint32_t region = region_.load(std::memory_order_relaxed) + 1;
  // Closed first: a worker that is late for the last region may read a mixture of the two jobs, and
  // must then fail to take a chunk.
  for (int share = 0; share < threads(); ++share) {
    shares_[share].state.store((uint64_t{region} << 32) | kNoItem);
  }
  grain = std::max<int64_t>(grain, 1);
  job_count_.store(count, std::memory_order_release);
  job_grain_.store(grain, std::memory_order_release);
  job_invoke_.store(invoke, std::memory_order_release);
  job_context_.store(context, std::memory_order_release);
  done_.store(0, std::memory_order_relaxed);
  for (int share = 0; share < threads(); ++share) {
    const auto begin = static_cast<uint64_t>(share_begin(share, threads(), count, grain));
    shares_[share].state.store((uint64_t{region} << 32) | begin, std::memory_order_release);
  }
  region_.store(region);
  // Either this sees the sleeper, or the sleeper sees the new region before it sleeps.
  if (sleepers_.load() > 0) region_.notify_all();

  work(0);
  const auto finished = [&] { return done_.load(std::memory_order_acquire) == count; };
  if (finished()) return;
  if (!oversubscribed_ && spin_until(finished)) return;
  while (!finished()) sched_yield();
}

void ThreadPool::work(int thread) {
  const uint64_t region = shares_[thread].state.load(std::memory_order_acquire) >> 32;
  int64_t done = 0;
  for (int i = 0; i < threads(); ++i) {
    done += work_on_share(region, (thread + i) % threads(), thread);
  }
  if (done > 0) done_.fetch_add(done, std::memory_order_release);
}

// Takes chunks of a share until there are none; returns the number of items done.
int64_t ThreadPool::work_on_share(uint64_t region, int share, int thread) {
  std::atomic<uint64_t>& shared_state = shares_[share].state;
  uint64_t state = shared_state.load(std::memory_order_acquire);
  int64_t done = 0;
  for (;;) {
    const int64_t count = job_count_.load(std::memory_order_acquire);
    const int64_t grain = job_grain_.load(std::memory_order_acquire);
    const Invoke invoke = job_invoke_.load(std::memory_order_acquire);
    const void* context = job_context_.load(std::memory_order_acquire);
    const int64_t begin = static_cast<int64_t>(state & 0xffffffffu);
    const int64_t left = share_begin(share + 1, threads(), count, grain) - begin;
    if (state >> 32 != region || left <= 0) return done;
    int64_t size = std::max(grain, (left + 1) / 2);
    if (left - size < grain) size = left;
    // Failure re-reads the state; success proves that the job was read from this region.
    if (!shared_state.compare_exchange_weak(state, state + static_cast<uint64_t>(size),
                                            std::memory_order_acq_rel, std::memory_order_acquire)) {
      continue;
    }
    invoke(context, begin, begin + size, thread);
    done += size;
    state = shared_state.load(std::memory_order_acquire);
  }
}

void ThreadPool::worker_loop(int thread) {
  uint32_t seen = 0;
  for (;;) {
    const auto changed = [&] { return region_.load(std::memory_order_acquire) != seen; };
    if (oversubscribed_ || !spin_until(changed)) {
      sleepers_.fetch_add(1);
      region_.wait(seen);
      sleepers_.fetch_sub(1);
    }
    seen = region_.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_acquire)) return;
    work(thread);
  }
}

}  // namespace frspec::cpu
