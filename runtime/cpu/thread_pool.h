// A fixed pool: the caller and threads - 1 workers share the items of a parallel region.
//
// Every thread has a share of the items, the same for the same number of items, so that it finds in
// its caches what it wrote in an earlier region. It takes its share in chunks that shrink, and then
// helps the others with theirs, so that on a shared machine one slow thread does not hold up the
// rest. A worker that has not woken when the others finish is not waited for. A region allocates
// nothing, and costs less than a microsecond for two threads while the workers are awake; idle
// workers spin for some tens of microseconds and then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace frspec::cpu {

// The number of CPUs that this process may use: scheduler affinity and cgroup quota.
int usable_threads();
// CPUs that the quota of the process's cgroups allows, rounded up; a large number without a quota.
// `root` as in host_memory.h.
int quota_threads(const std::string& root);

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // >= 1; DeviceError when a thread cannot be started
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(begin, end, thread) for chunks that cover [0, count) once; thread is in
  // [0, threads()) and no two concurrent calls have the same. Chunks have at least `grain` items,
  // the last one excepted. The body must not throw. One region at a time.
  template <typename Body>
  void parallel_for(int64_t count, int64_t grain, const Body& body) {
    if (count <= 0) return;
    if (workers_.empty() || count <= grain) {
      body(int64_t{0}, count, 0);
      return;
    }
    run(
        count, grain,
        [](const void* context, int64_t begin, int64_t end, int thread) {
          (*static_cast<const Body*>(context))(begin, end, thread);
        },
        &body);
  }

 private:
  using Invoke = void (*)(const void* context, int64_t begin, int64_t end, int thread);

  // A thread's part of a region, all in one cache line: on cores that share no cache, what a region
  // costs is the number of lines that have to go from one to another.
  struct alignas(64) Share {
    // The region's number in the upper 32 bits, then the next and the end of the grains to hand
    // out, 16 bits each: taking a chunk checks in the same step that the region is still the one
    // whose job was read.
    std::atomic<uint64_t> state{0};
    std::atomic<int64_t> count{0};
    std::atomic<int64_t> grain{1};
    std::atomic<Invoke> invoke{nullptr};
    std::atomic<const void*> context{nullptr};
  };
  // What a thread did: the region's number in the upper 32 bits, grains in the lower.
  struct alignas(64) Progress {
    std::atomic<uint64_t> done{0};
  };

  void run(int64_t count, int64_t grain, Invoke invoke, const void* context);
  void work(uint32_t region, int thread, int64_t done);
  int64_t work_on_share(uint32_t region, int share, int thread);
  void worker_loop(int thread);
  void stop();

  std::unique_ptr<Share[]> shares_;              // [threads]
  std::unique_ptr<Progress[]> progress_;         // [threads]
  alignas(64) std::atomic<uint32_t> region_{0};  // the last one's number: what workers sleep on
  alignas(64) std::atomic<int> sleepers_{0};     // written when threads fall asleep or wake
  std::atomic<bool> stopping_{false};
  bool oversubscribed_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace frspec::cpu
