// Fibers: their stacks, switching among the threads of a block, and whose turn it is.
#include <pthread.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "sanitizers.h"
#include "thread_block.h"

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{1, 1, 1};
constinit thread_local dim3 gridDim{1, 1, 1};

namespace emulation {

constinit thread_local Fiber* this_fiber = nullptr;

namespace {

constexpr size_t kGuardBytes = 4096;

size_t stack_bytes() {
  if (config().stack_bytes != 0) return config().stack_bytes;
  return kAddressSanitizer || kThreadSanitizer ? 256 << 10 : 64 << 10;
}

FRSPEC_EMULATION_NO_ASAN void switch_to(Fiber& to, Fiber& from) {
  if (&to == &from) return;
  this_fiber = &to;
  threadIdx = to.thread;
  before_switch(&from.fake_stack, to.stack, to.stack_bytes);
  switch_race_thread(to.race_thread);
  switch_context(from.context, to.context);
  after_switch(from.fake_stack);
}

void end_of_thread(Fiber& self) {
  Block& block = *self.block;
  if (config().require_dependency_wait && !self.waited_for_dependency) {
    fail("ended without dependency_wait()");
  }
  check_hopper_at_end(self);
  release(&block.end_tag);
  self.copies.clear();
  self.copy_groups.clear();
  stop_running(self, Waiting::kEnded);
  ++block.ended;
}

// Each turn of the loop is one CUDA thread; between two of them the fiber rests in run_next().
FRSPEC_EMULATION_NO_ASAN void fiber_main() {
  after_switch(nullptr);
  for (;;) {
    Fiber& self = *this_fiber;
    acquire(&self.block->start_tag);
    self.carved = 0;
    self.waited_for_dependency = false;
    self.block->call->invoke(self.block->call->arguments.get());
    end_of_thread(self);
    run_next(self);
  }
}

// Stacks are apart by a power of two; without a shift their hot ends would share a few cache sets.
void start_fiber(Fiber& fiber, size_t index) {
  const size_t shift = index * 320 % 4096;
  prepare_context(fiber.context, fiber.stack, fiber.stack_bytes - shift, fiber_main);
}

std::unique_ptr<Fiber> make_fiber(size_t index) {
  auto fiber = std::make_unique<Fiber>();
  const size_t bytes = stack_bytes();
  void* memory = mmap(nullptr, bytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    throw Error("cannot map the stack of a thread");
  }
  fiber->stack = static_cast<char*>(memory) + kGuardBytes;
  fiber->stack_bytes = bytes;
  fiber->race_thread = make_race_thread();
  start_fiber(*fiber, index);
  return fiber;
}

uint64_t next_random(Block& block) {
  uint64_t& state = block.random_state;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

// One of the bits of a mask that is not 0.
uint32_t choose_bit(Block& block, uint32_t mask) {
  switch (block.order) {
    case Order::kForward:
      return static_cast<uint32_t>(std::countr_zero(mask));
    case Order::kReverse:
      return 31 - static_cast<uint32_t>(std::countl_zero(mask));
    case Order::kRandom:
      break;
  }
  auto skip = next_random(block) % static_cast<unsigned>(std::popcount(mask));
  for (; skip > 0; --skip) mask &= mask - 1;
  return static_cast<uint32_t>(std::countr_zero(mask));
}

uint32_t ready_lanes(const Warp& warp) { return warp.runnable & ~warp.polled; }

// The thread whose turn it is: one of the same warp as long as there is one. Null: none can go on.
Fiber* choose_next(Block& block) {
  uint32_t lanes = ready_lanes(block.warps[block.current_warp]);
  if (lanes == 0 || block.order == Order::kRandom) {
    uint32_t ready = 0;
    for (uint32_t left = block.ready_warps; left != 0; left &= left - 1) {
      const auto warp = static_cast<uint32_t>(std::countr_zero(left));
      if (ready_lanes(block.warps[warp]) != 0) ready |= 1u << warp;
    }
    if (ready == 0) return nullptr;
    block.current_warp = choose_bit(block, ready);
    lanes = ready_lanes(block.warps[block.current_warp]);
  }
  return block.fibers[block.current_warp * kWarpThreads + choose_bit(block, lanes)].get();
}

// Pollers get their next turn when the host has seen that the others wait.
bool forget_polls(Block& block) {
  bool any = false;
  for (uint32_t w = 0; w < block.warp_count; ++w) {
    any |= (block.warps[w].polled & block.warps[w].runnable) != 0;
    block.warps[w].polled = 0;
  }
  return any;
}

void shape_block(Block& block, const dim3& shape) {
  block.shape = shape;
  block.threads = shape.x * shape.y * shape.z;
  block.warp_count = (block.threads + kWarpThreads - 1) / kWarpThreads;
  while (block.fibers.size() < block.threads) {
    block.fibers.push_back(make_fiber(block.fibers.size()));
  }
  for (Warp& warp : block.warps) warp.existing = 0;
  for (uint32_t i = 0; i < block.threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.block = &block;
    fiber.thread = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
    fiber.warp = i / kWarpThreads;
    fiber.lane = i % kWarpThreads;
    block.warps[fiber.warp].existing |= 1u << fiber.lane;
  }
}

}  // namespace

Block::~Block() {
  for (const auto& fiber : fibers) {
    end_race_thread(fiber->race_thread);
    munmap(fiber->stack - kGuardBytes, fiber->stack_bytes + kGuardBytes);
  }
}

int current_lane() { return static_cast<int>(this_fiber->lane); }

void run_next(Fiber& self) {
  Block& block = *self.block;
  release(&block.end_tag);  // the host may clean up after an error of another thread
  Fiber* next = choose_next(block);
  if (next == nullptr) {
    block.polling = forget_polls(block);
    next = block.host;
  }
  switch_to(*next, self);
}

void maybe_run_others(Fiber& self) {
  if (self.block->order != Order::kRandom) return;
  Fiber* next = choose_next(*self.block);
  if (next != nullptr) switch_to(*next, self);
}

void yield_thread() {
  Fiber& self = *this_fiber;
  self.block->warps[self.warp].polled |= 1u << self.lane;
  run_next(self);
}

void wait_for_dependency() {
  Fiber& self = *this_fiber;
  self.waited_for_dependency = true;
  if (!self.block->early) return;
  stop_running(self, Waiting::kDependency);
  run_next(self);
  acquire(&self.block->start_tag);
}

void launch_dependents() {
  if (this_fiber->waited_for_dependency) return;
  statistics().launches_before_wait.fetch_add(1, std::memory_order_relaxed);
}

void abandon_block(Fiber& self, std::string error) {
  Block& block = *self.block;
  block.error.swap(error);
  // This stack is never unwound: what it holds has to be freed here.
  std::string().swap(error);
  if (block.unwatched) {
    block.unwatched = false;
    end_unwatched();
  }
  release(&block.end_tag);
  switch_to(*block.host, self);
  std::abort();
}

void fail(std::string message) {
  Fiber* self = this_fiber;
  if (self == nullptr) throw Error(message);
  std::string error = describe(*self->block, self) + message;
  std::string().swap(message);
  abandon_block(*self, std::move(error));
}

void start_block(Block& block, const KernelCall& call, uint3 index, Fiber& host) {
  block.call = &call;
  block.index = index;
  block.host = &host;
  block.error.clear();
  block.order = config().order;
  block.random_state =
      (config().seed * 0x9E3779B97F4A7C15u + index.x * 1000003u + index.y * 7919u + index.z + 1) |
      1;
  const dim3& shape = call.block;
  if (shape.x != block.shape.x || shape.y != block.shape.y || shape.z != block.shape.z) {
    shape_block(block, shape);
  }
  block.ended = 0;
  block.early = false;
  block.at_barrier = 0;
  block.current_warp = 0;
  block.ready_warps = 0;
  for (uint32_t w = 0; w < block.warp_count; ++w) {
    block.warps[w].runnable = 0;
    block.warps[w].waiting = 0;
    block.warps[w].polled = 0;
    make_runnable(block, w, block.warps[w].existing);
  }
  start_shared_memory(block);
  start_hopper(block);
  statistics().blocks.fetch_add(1, std::memory_order_relaxed);
}

bool resume_block(Block& block) {
  blockIdx = block.index;
  blockDim = block.call->block;
  gridDim = block.call->grid;
  block.polling = false;
  release(&block.start_tag);
  Fiber* first = choose_next(block);
  if (first != nullptr) switch_to(*first, *block.host);
  acquire(&block.end_tag);
  this_fiber = nullptr;
  if (!block.error.empty() || block.ended == block.threads) return true;
  if (block.polling || block.early) return false;
  block.error = describe(block, nullptr) + "no thread can go on" +
                (block.ended > 0 ? " (a thread exits while others wait)" : "") + ":" +
                describe_threads(block);
  return true;
}

void release_dependents(Block& block) {
  block.early = false;
  for (uint32_t i = 0; i < block.threads; ++i) {
    const Fiber& fiber = *block.fibers[i];
    if (fiber.waiting == Waiting::kDependency) {
      block.fibers[i]->waiting = Waiting::kNothing;
      make_runnable(block, fiber.warp, 1u << fiber.lane);
    }
  }
}

void reset_block(Block& block) {
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.copies.clear();
    fiber.copy_groups.clear();
    allow_access(fiber.stack, fiber.stack_bytes);
    fiber.fake_stack = nullptr;
    end_race_thread(fiber.race_thread);
    fiber.race_thread = make_race_thread();
    start_fiber(fiber, i);
  }
  block.unwatched = false;
}

void describe_host(Fiber& host) {
  host.race_thread = this_race_thread();
  if (!kAddressSanitizer || host.stack != nullptr) return;
  pthread_attr_t attributes;
  void* stack = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return;
  pthread_attr_getstack(&attributes, &stack, &host.stack_bytes);
  pthread_attr_destroy(&attributes);
  host.stack = static_cast<char*>(stack);
}

}  // namespace emulation
