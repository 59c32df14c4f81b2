// A block of CUDA threads while it runs: the fibers, their warps, the shared memory, and the
// scheduler's interface to barriers and collectives. Internal to the emulation.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "context_switch.h"
#include "device_thread.h"
#include "emulation_config.h"
#include "kernel_launch.h"

namespace emulation {

constexpr uint32_t kWarpThreads = 32;
constexpr uint32_t kMaxWarps = 32;
constexpr size_t kDefaultSharedBytes = 48 << 10;  // more has to be asked for; the most for statics

struct Block;

struct AsyncCopy {
  void* destination;
  const void* source;
  uint32_t source_bytes;
  uint32_t bytes;
  bool taken;  // before dependency_wait(): what the source held then
  std::array<unsigned char, 16> held;
};

// ---- of Hopper (hopper_emulation.cpp)

// A box of a matrix on its way into shared memory.
struct BoxCopy {
  void* shared;
  const unsigned char* data;
  int64_t rows;
  int64_t columns;
  int64_t row_bytes;
  uint32_t box_rows;
  int column;
  int row;
  std::vector<unsigned char> held;  // before dependency_wait(): the rows as the source held them
};
// A barrier in shared memory whose phase ends when its thread has arrived and no byte is missing.
struct TransactionBarrier {
  const uint64_t* address;
  bool arrived;
  int64_t missing_bytes;
  uint32_t phase;
  std::vector<BoxCopy> copies;  // under way
};
struct ProductStep {
  const void* a;
  const void* b;
  bool is_bf16;
};
// A warp's products that add to the same sums, which are elsewhere until they are waited for.
struct ProductChain {
  int tiles = 0;
  std::array<float*, kWarpThreads> d{};
  std::vector<float> sums;
  std::vector<ProductStep> steps;
  size_t committed = 0;  // of the steps
};
struct WarpProducts {
  bool begun = false;
  std::vector<ProductChain> chains;
};

// Why a thread does not run.
enum class Waiting : uint8_t { kNothing, kWarp, kBlock, kDependency, kEnded };

// A CUDA thread, or the host's code that runs a block (which has no block of its own).
struct Fiber {
  Context context;
  Block* block = nullptr;
  uint3 thread{};
  uint32_t warp = 0;
  uint32_t lane = 0;

  Waiting waiting = Waiting::kEnded;
  const char* operation = "";  // that it waits in
  Site site;
  uint32_t carved = 0;  // pieces of dynamic shared memory so far
  bool waited_for_dependency = false;
  std::vector<AsyncCopy> copies;      // not performed yet, in order
  std::vector<uint32_t> copy_groups;  // end of each committed group in `copies`

  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* race_thread = nullptr;
  char arrived_tag = 0;
  char woken_tag = 0;
};

// Sets of lanes, and what each waiting lane brought to its collective.
struct Warp {
  uint32_t existing = 0;
  uint32_t runnable = 0;
  uint32_t waiting = 0;  // in a collective
  uint32_t polled = 0;   // runnable, but only after all others
  std::array<uint32_t, kWarpThreads> masks;
  std::array<CollectiveWork, kWarpThreads> works;
  std::array<void*, kWarpThreads> operands;
};

struct SharedPiece {
  const void* key;  // null: dynamic
  unsigned char* data;
  size_t bytes;
  const char* name;
};

// Of fixed size: ThreadSanitizer would see the threads of a block race for a vector that grows.
struct SharedPieces {
  static constexpr size_t kCapacity = 64;
  std::array<SharedPiece, kCapacity> items;
  size_t count = 0;
};

struct Block {
  const KernelCall* call = nullptr;
  uint3 index{};
  dim3 shape{0, 0, 0};  // of the threads that fibers and warps are set up for
  uint32_t threads = 0;
  uint32_t ended = 0;
  bool early = false;    // runs up to dependency_wait() only
  bool polling = false;  // gave up its turn because all runnable threads poll
  uint64_t progress = 0;
  std::string error;
  bool unwatched = false;
  Fiber* host = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;

  Order order = Order::kForward;
  uint64_t random_state = 1;
  std::array<Warp, kMaxWarps> warps;
  uint32_t warp_count = 0;
  uint32_t ready_warps = 0;  // with a runnable thread
  uint32_t current_warp = 0;

  uint32_t at_barrier = 0;
  Vote barrier_vote = Vote::kNone;
  Site barrier_site;
  int barrier_votes = 0;
  int barrier_result = 0;
  uint32_t barriers_passed = 0;

  std::vector<unsigned char> shared_storage;
  unsigned char* shared = nullptr;
  size_t shared_capacity = 0;
  size_t shared_used = 0;  // with gaps
  size_t static_bytes = 0;
  size_t dynamic_bytes = 0;
  SharedPieces statics;
  SharedPieces carved;

  std::vector<TransactionBarrier> transaction_barriers;
  std::array<WarpProducts, kMaxWarps> products;

  char start_tag = 0;
  char end_tag = 0;
  // Two, so that one who comes early to the next barrier does not leak into this one.
  char barrier_tags[2] = {};

  ~Block();
};

// The fiber that runs on this OS thread; null: host code.
extern constinit thread_local Fiber* this_fiber FRSPEC_EMULATION_TLS;

// "kernel k, block (0,0,0), thread (3,0,0) (warp 0 lane 3): "; without a thread, or "host code: ".
std::string describe(const Block& block, const Fiber* fiber);
std::string describe_current();
std::string describe_site(const Site& site);
// What each thread of the block does, in groups.
std::string describe_threads(const Block& block);
// The same source line, whatever the column.
inline bool same_line(const Site& a, const Site& b) {
  return std::memcmp(&a, &b, sizeof(Site)) == 0 ||
         (a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0);
}

// ---- scheduler.cpp

// Gives up the turn; returns when the thread is runnable again and chosen.
void run_next(Fiber& self);
inline void make_runnable(Block& block, uint32_t warp, uint32_t lanes) {
  block.warps[warp].runnable |= lanes;
  block.warps[warp].waiting &= ~lanes;
  block.ready_warps |= 1u << warp;
}
// Marks the thread as not runnable; it must then call run_next().
inline void stop_running(Fiber& fiber, Waiting why) {
  Block& block = *fiber.block;
  Warp& warp = block.warps[fiber.warp];
  fiber.waiting = why;
  warp.runnable &= ~(1u << fiber.lane);
  if (warp.runnable == 0) block.ready_warps &= ~(1u << fiber.warp);
  ++block.progress;
}
// In Order::kRandom: now and then, lets others go first although the thread could go on.
void maybe_run_others(Fiber& self);
// Ends the launch with this error.
[[noreturn]] void abandon_block(Fiber& self, std::string error);

void start_block(Block& block, const KernelCall& call, uint3 index, Fiber& host);
// True: the block ended, or failed (block.error). False: its threads poll, or, when it is early,
// all that can be done before dependency_wait() is done.
bool resume_block(Block& block);
// Ends the early phase: dependency_wait() lets all go on.
void release_dependents(Block& block);
// Makes a block usable again whose threads did not end.
void reset_block(Block& block);
// How the host's code on this OS thread appears to the sanitizers.
void describe_host(Fiber& host);

// ---- shared_memory.cpp

void start_shared_memory(Block& block);
// An error when something wrote between the pieces; then forgets them.
void finish_shared_memory(Block& block);

// ---- hopper_emulation.cpp

void start_hopper(Block& block);
// Fails when this thread, the last of its warp or block, leaves something under way.
void check_hopper_at_end(const Fiber& self);

// ---- kernel_runner.cpp

// Runs the kernel now, on this OS thread and on helpers. When `follower` is not null, it is the
// next kernel in the stream; it then must be the next that is run on this OS thread.
void run_kernel(const KernelCall& call, const KernelCall* follower = nullptr);

}  // namespace emulation
