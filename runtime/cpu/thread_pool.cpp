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
constexpr int64_t kMostGrains = 0xffff;

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

uint64_t share_state(uint32_t region, int64_t next, int64_t end) {
  return uint64_t{region} << 32 | static_cast<uint64_t>(next) << 16 | static_cast<uint64_t>(end);
}

uint32_t region_of(uint64_t state_or_progress) {
  return static_cast<uint32_t>(state_or_progress >> 32);
}

// Of the grains that are left, half at a time: the rest can go to who is done first.
int64_t chunk_size(int64_t left) { return (left + 1) / 2; }

}  // namespace

int quota_threads(const std::string& root) {
  int allowed = 1 << 16;
  for (const std::string& folder : cgroup_folders("cpu", root)) {
    double quota = -1;  // microseconds a period; cpu.max says "max" where there is none
    double period = 0;
    std::ifstream unified(folder + "/cpu.max");
    if (unified) {
      unified >> quota >> period;
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

int usable_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int count = 0;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) count = CPU_COUNT(&set);
  if (count <= 0) count = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return std::min(count, quota_threads(""));
}

ThreadPool::ThreadPool(int threads)
    : shares_(std::make_unique<Share[]>(static_cast<size_t>(threads))),
      progress_(std::make_unique<Progress[]>(static_cast<size_t>(threads))),
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
  grain = std::max<int64_t>(grain, 1);
  grain *= ((count + grain - 1) / grain + kMostGrains - 1) / kMostGrains;
  const int64_t grains = (count + grain - 1) / grain;
  const auto share_begin = [&](int64_t share) {  // with few grains the first shares have them
    return (grains * share + threads() - 1) / threads();
  };
  const int64_t own_first = chunk_size(share_begin(1));

  // Either this sees the sleeper, or the sleeper sees the new region before it sleeps. Asked before
  // anything is handed out, while no line that it waits for is on its way to another core.
  const uint32_t region = region_.load(std::memory_order_relaxed) + 1;
  region_.store(region);
  const bool wake = sleepers_.load() > 0;
  for (int share = threads() - 1; share >= 0; --share) {
    Share& to = shares_[share];
    to.count.store(count, std::memory_order_relaxed);
    to.grain.store(grain, std::memory_order_relaxed);
    to.invoke.store(invoke, std::memory_order_relaxed);
    to.context.store(context, std::memory_order_relaxed);
    // The caller has its first chunk already: to take it would be to wait for the stores above.
    const int64_t next = share == 0 ? own_first : share_begin(share);
    to.state.store(share_state(region, next, share_begin(share + 1)), std::memory_order_release);
  }
  if (wake) region_.notify_all();

  invoke(context, 0, std::min(own_first * grain, count), 0);
  work(region, 0, own_first);
  const auto finished = [&] {
    int64_t done = 0;
    for (int thread = 0; thread < threads() && done < grains; ++thread) {
      const uint64_t progress = progress_[thread].done.load(std::memory_order_acquire);
      if (region_of(progress) == region) done += static_cast<uint32_t>(progress);
    }
    return done == grains;
  };
  if (finished()) return;
  if (!oversubscribed_ && spin_until(finished)) return;
  while (!finished()) sched_yield();
}

// Works on the thread's own share, then on the others'. done: the grains it did before.
void ThreadPool::work(uint32_t region, int thread, int64_t done) {
  for (int i = 0; i < threads(); ++i) {
    const int64_t more = work_on_share(region, (thread + i) % threads(), thread);
    if (more == 0 && i > 0) continue;
    done += more;  // told before the next share is looked at: that may be elsewhere
    progress_[thread].done.store(uint64_t{region} << 32 | static_cast<uint64_t>(done),
                                 std::memory_order_release);
  }
}

// Takes chunks of a share until there are none; returns the number of grains done.
int64_t ThreadPool::work_on_share(uint32_t region, int share, int thread) {
  Share& from = shares_[share];
  uint64_t state = from.state.load(std::memory_order_acquire);
  int64_t done = 0;
  for (;;) {
    const auto next = static_cast<int64_t>(state >> 16 & 0xffff);
    const auto end = static_cast<int64_t>(state & 0xffff);
    if (region_of(state) != region || next >= end) return done;
    const int64_t size = chunk_size(end - next);
    const int64_t count = from.count.load(std::memory_order_relaxed);
    const int64_t grain = from.grain.load(std::memory_order_relaxed);
    const Invoke invoke = from.invoke.load(std::memory_order_relaxed);
    const void* context = from.context.load(std::memory_order_relaxed);
    // The job is written anew only after all grains were taken: success proves that it was read
    // from this region. Failure re-reads the state.
    if (!from.state.compare_exchange_weak(state, share_state(region, next + size, end),
                                          std::memory_order_acq_rel, std::memory_order_acquire)) {
      continue;
    }
    invoke(context, next * grain, std::min((next + size) * grain, count), thread);
    done += size;
    state = from.state.load(std::memory_order_acquire);
  }
}

void ThreadPool::worker_loop(int thread) {
  const std::atomic<uint64_t>& state = shares_[thread].state;
  uint32_t seen = 0;
  for (;;) {
    const auto handed_out = [&] {
      return region_of(state.load(std::memory_order_acquire)) != seen;
    };
    if (oversubscribed_ || !spin_until(handed_out)) {
      sleepers_.fetch_add(1);
      region_.wait(seen);
      sleepers_.fetch_sub(1);
      while (!handed_out() && !stopping_.load()) sched_yield();
    }
    if (stopping_.load(std::memory_order_acquire)) return;
    seen = region_of(state.load(std::memory_order_acquire));
    work(seen, thread, 0);
  }
}

}  // namespace frspec::cpu
