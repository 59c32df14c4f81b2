// Runs the blocks of a kernel, on one OS thread or on several, and starts the first block of the
// kernel behind it early.
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <thread>

#include "device_memory.h"
#include "sanitizers.h"
#include "thread_block.h"

namespace emulation {
namespace {

// A block is given up when its threads poll this often without anything else happening.
constexpr int kPatience = 1000;

// A launch while it runs: its blocks are handed out in the order that Config asks for.
class Launch {
 public:
  explicit Launch(const KernelCall& call)
      : call_(call), blocks_(uint64_t{call.grid.x} * call.grid.y * call.grid.z) {
    if (config().order != Order::kRandom) return;
    constexpr uint64_t kStride = 7919;
    stride_ = std::gcd(kStride, blocks_) == 1 ? kStride : 1;
    shift_ = config().seed % blocks_;
  }

  const KernelCall& call() const { return call_; }
  uint64_t blocks() const { return blocks_; }
  const std::string& error() const { return error_; }

  uint3 first() const { return index_of(0); }
  void skip_first() { next_.store(1, std::memory_order_relaxed); }

  // False when none is left.
  bool take(uint3& index) {
    const uint64_t turn = next_.fetch_add(1, std::memory_order_relaxed);
    if (turn >= blocks_) return false;
    index = index_of(turn);
    return true;
  }

  // Keeps the first error; no further block is handed out.
  void fail(const std::string& error) {
    const std::lock_guard lock(mutex_);
    if (error_.empty()) error_ = error;
    next_.store(blocks_, std::memory_order_relaxed);
  }

 private:
  uint3 index_of(uint64_t turn) const {
    if (config().order == Order::kReverse) turn = blocks_ - 1 - turn;
    const uint64_t number = (turn * stride_ + shift_) % blocks_;
    return {static_cast<unsigned>(number % call_.grid.x),
            static_cast<unsigned>(number / call_.grid.x % call_.grid.y),
            static_cast<unsigned>(number / call_.grid.x / call_.grid.y)};
  }

  const KernelCall& call_;
  uint64_t blocks_;
  uint64_t stride_ = 1;
  uint64_t shift_ = 0;
  std::atomic<uint64_t> next_{0};
  std::mutex mutex_;
  std::string error_;
};

// What an OS thread keeps to run blocks with; fibers never change their OS thread.
class Runner {
 public:
  static Runner& on_this_thread() {
    // By pointer: thread-local storage of a library that is loaded late is scarce.
    static thread_local std::unique_ptr<Runner> runner;
    if (runner == nullptr) runner.reset(new Runner);
    return *runner;
  }

  // Takes over the first block of this kernel if it was started early; run_taken() goes on with it.
  bool take(const KernelCall& call) {
    if (early_call_ != &call) {
      drop_started();
      return false;
    }
    early_call_ = nullptr;
    taken_ = true;
    std::swap(block_, early_block_);
    return true;
  }

  // Runs the first block of the kernel up to dependency_wait().
  void start_early(const KernelCall& call) {
    call.check_arguments(call.name, call.arguments.get());
    const Launch launch(call);
    Block& block = *early_block_;
    start_block(block, call, launch.first(), host_);
    block.early = true;
    early_call_ = &call;
    for (int idle = 0; !resume_block(block) && block.polling && idle < kPatience;) ++idle;
    if (block.error.empty()) return;
    throw Error(block.error + " (before the kernel in front of it has run)");
  }

  // Forgets blocks that have begun.
  void drop_started() {
    if (taken_) drop(*block_);
    if (early_call_ != nullptr) drop(*early_block_);
    taken_ = false;
    early_call_ = nullptr;
  }

  void run_taken(Launch& launch) {
    taken_ = false;
    release_dependents(*block_);
    finish(launch);
  }

  // Runs blocks until none is left or one failed.
  void run(Launch& launch) {
    uint3 index;
    while (launch.take(index)) {
      start_block(*block_, launch.call(), index, host_);
      finish(launch);
    }
  }

 private:
  Runner() { describe_host(host_); }

  void drop(Block& block) {
    finish_shared_memory(block);
    reset_block(block);
  }

  // Runs the started block to its end.
  void finish(Launch& launch) {
    Block& block = *block_;
    int idle = 0;
    uint64_t progress = block.progress;
    while (!(block.ended == block.threads && block.error.empty()) && !resume_block(block)) {
      idle = block.progress == progress ? idle + 1 : 0;
      progress = block.progress;
      if (idle > kPatience) {
        block.error = describe(block, nullptr) +
                      "polls for what no thread of the block does:" + describe_threads(block);
        break;
      }
    }
    const bool ended = block.error.empty();
    finish_shared_memory(block);
    if (!ended) reset_block(block);
    if (!block.error.empty()) launch.fail(block.error);
  }

  Fiber host_;
  std::unique_ptr<Block> block_ = std::make_unique<Block>();
  std::unique_ptr<Block> early_block_ = std::make_unique<Block>();
  const KernelCall* early_call_ = nullptr;  // whose first block early_block_ is
  bool taken_ = false;                      // block_ has begun
};

// OS threads that help with a launch. They live as long as the process.
class Helpers {
 public:
  static Helpers& get() {
    // A forked child has none of its parent's threads.
    static Helpers* helpers = nullptr;
    if (helpers == nullptr || helpers->process_ != getpid()) helpers = new Helpers;
    return *helpers;
  }

  // Runs the launch here and on up to `count` helpers, those that wake in time.
  void run(Launch& launch, int count) {
    {
      const std::lock_guard lock(mutex_);
      for (; started_ < count; ++started_) {
        std::thread([this, number = started_] { help(number); }).detach();
      }
      launch_ = &launch;
      wanted_ = count;
      ++round_;
    }
    wake_.notify_all();
    Runner::on_this_thread().run(launch);
    std::unique_lock lock(mutex_);
    launch_ = nullptr;
    done_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void help(int number) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return launch_ != nullptr && round_ != seen && number < wanted_; });
      seen = round_;
      Launch& launch = *launch_;
      ++busy_;
      lock.unlock();
      Runner::on_this_thread().run(launch);
      lock.lock();
      if (--busy_ == 0) done_.notify_all();
    }
  }

  const pid_t process_ = getpid();
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Launch* launch_ = nullptr;
  uint64_t round_ = 0;
  int started_ = 0;
  int wanted_ = 0;
  int busy_ = 0;
};

}  // namespace

void run_kernel(const KernelCall& call, const KernelCall* follower) {
  statistics().launches.fetch_add(1, std::memory_order_relaxed);
  Runner& runner = Runner::on_this_thread();
  try {
    // What was good when the call was queued or captured may have been freed since.
    call.check_arguments(call.name, call.arguments.get());
    const bool taken = runner.take(call);
    if (follower != nullptr) runner.start_early(*follower);
    Launch launch(call);
    if (taken) {
      launch.skip_first();
      runner.run_taken(launch);
    }
    const auto threads = static_cast<int>(
        std::min<uint64_t>(static_cast<uint64_t>(config().threads), launch.blocks()));
    if (threads > 1) {
      Helpers::get().run(launch, threads - 1);
    } else {
      runner.run(launch);
    }
    if (!launch.error().empty()) throw Error(launch.error());
    check_device_margins(call.name);
  } catch (...) {
    runner.drop_started();
    throw;
  }
}

}  // namespace emulation
