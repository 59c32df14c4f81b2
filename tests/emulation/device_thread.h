// What a CUDA thread is made of: its built-in variables, barriers, shared memory, asynchronous
// copies, and how it reports a failure. The functions of namespace emulation may be called by
// device code only, except where they say otherwise.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <type_traits>

// Without it every access would be a call, in a position-independent library.
#define FRSPEC_EMULATION_TLS __attribute__((tls_model("initial-exec")))

extern constinit thread_local uint3 threadIdx FRSPEC_EMULATION_TLS;
extern constinit thread_local uint3 blockIdx FRSPEC_EMULATION_TLS;
extern constinit thread_local dim3 blockDim FRSPEC_EMULATION_TLS;
extern constinit thread_local dim3 gridDim FRSPEC_EMULATION_TLS;
inline constexpr int warpSize = 32;

namespace emulation {

// The source line that an operation is written on: threads that meet must be at the same one.
using Site = std::source_location;

// Ends the launch with an Error that names the kernel, the block and the thread. From host code:
// throws.
[[noreturn]] void fail(std::string message);

int current_lane();

enum class Vote : uint8_t { kNone, kAny, kAll, kCount };
int block_barrier(Vote vote, int predicate, const char* name, Site site);

// An operation of the lanes in `mask`. The lane that arrives last does the work of all:
// work(operands, mask), where operands[lane] is the `operand` of that lane. Only some of these
// operations order memory accesses.
using CollectiveWork = void (*)(void* const* operands, uint32_t mask);
void warp_collective(CollectiveWork work, const char* name, uint32_t mask, void* operand, Site site,
                     bool orders_memory = false);

// Lets all other threads go on; for loops that poll.
void yield_thread();

// The object of this block that belongs to `key`, NaN at first.
void* shared_static(const void* key, size_t bytes, size_t align, const char* name);
// Pieces of the dynamic shared memory, in order; every thread asks for the same.
void restart_carving();
void* carve_dynamic(size_t bytes);
// All bytes belong to this block's shared memory.
bool in_shared(const void* p, size_t bytes);
// All bytes belong to one allocation of device memory. Also from host code.
bool in_device(const void* p, size_t bytes);

// Asynchronous copies of the thread: source_bytes from global memory, the rest of `bytes` zero.
void copy_async(void* shared, const void* global, uint32_t source_bytes, uint32_t bytes);
void commit_copies();
void wait_for_copies(uint32_t pending_groups);

// Whether the thread has waited is checked when it ends (Config::require_dependency_wait).
void wait_for_dependency();
// Counted where the thread has not waited yet.
void launch_dependents();

}  // namespace emulation

inline void __syncthreads(emulation::Site site = emulation::Site::current()) {
  emulation::block_barrier(emulation::Vote::kNone, 0, "__syncthreads", site);
}
inline int __syncthreads_or(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::block_barrier(emulation::Vote::kAny, predicate, "__syncthreads_or", site);
}
inline int __syncthreads_and(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::block_barrier(emulation::Vote::kAll, predicate, "__syncthreads_and", site);
}
inline int __syncthreads_count(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::block_barrier(emulation::Vote::kCount, predicate, "__syncthreads_count", site);
}
inline void __nanosleep(unsigned) { emulation::yield_thread(); }
[[noreturn]] inline void __trap() { emulation::fail("__trap()"); }
inline bool __isShared(const void* p) { return emulation::in_shared(p, 1); }
inline bool __isGlobal(const void* p) { return emulation::in_device(p, 1); }
