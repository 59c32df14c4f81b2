// What a test may set and ask of the CUDA emulation: how threads, copies and streams are ordered,
// which device is pretended, what happens after a failure, and failures on demand.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace emulation {

// A bug that was noticed, in a kernel or in how the host uses the device.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// In which order threads, warps and blocks take turns. A correct kernel gives the same in all.
enum class Order : uint8_t { kForward, kReverse, kRandom };

// When an asynchronous copy into shared memory happens. kPoison: its destination is NaN from the
// call on and is written at the wait. kDefer: written at the wait. kEager: written at the call.
enum class Copies : uint8_t { kPoison, kDefer, kEager };

// When queued work is done. kLazy: when something waits for it, in graphs the latest node first, so
// that a missing wait shows. kImmediate: as soon as it is queued.
enum class Streams : uint8_t { kLazy, kImmediate };

// kThrow: the call that meets the failure throws Error, and the device works on. kSticky: as CUDA;
// the failure is printed, and that call and all later ones return cudaErrorLaunchFailure until
// reset_device().
enum class KernelErrors : uint8_t { kThrow, kSticky };

struct Config {
  Order order = Order::kForward;
  uint64_t seed = 1;  // of Order::kRandom
  Copies copies = Copies::kPoison;
  Streams streams = Streams::kLazy;
  KernelErrors kernel_errors = KernelErrors::kThrow;

  // A thread that ends without dependency_wait() fails the launch.
  bool require_dependency_wait = true;
  // The first block of a kernel runs up to dependency_wait() before the kernel in front of it in
  // the stream has begun (Streams::kLazy only), so that reading too early shows.
  bool overlap_kernels = true;
  // Device memory cannot be touched while host code runs.
  bool protect_memory = true;

  int threads = 1;         // OS threads that run blocks
  size_t stack_bytes = 0;  // of a CUDA thread, for those made from now on; 0: a default

  // The device. By default one with the limits of compute capability 9.0, but few multiprocessors.
  int device_count = 1;
  int driver_version = CUDART_VERSION;  // 0: no driver
  int compute_major = 9;
  int compute_minor = 0;
  bool hopper = false;  // kernels as in a build for 90a
  int multiprocessors = 4;
  size_t device_bytes = size_t{8} << 30;
  size_t shared_bytes_per_block = 227 << 10;
  size_t shared_bytes_per_multiprocessor = 228 << 10;
};

// Starts from the environment:
//   FRSPEC_EMULATION_ORDER    forward | reverse | random:SEED
//   FRSPEC_EMULATION_COPIES   poison | defer | eager
//   FRSPEC_EMULATION_STREAMS  lazy | immediate
//   FRSPEC_EMULATION_ERRORS   throw | sticky
//   FRSPEC_EMULATION_PROTECT  on | off
//   FRSPEC_EMULATION_HOPPER   off | on
//   FRSPEC_EMULATION_THREADS, _DEVICES, _DRIVER, _DEVICE_BYTES   numbers
//   FRSPEC_EMULATION_COMPUTE  MAJOR.MINOR, with the shared memory of such a device
//   FRSPEC_EMULATION_FAIL     CALL:ERROR[:AFTER], as fail_next(); ERROR is a number
// Error, at the first use, when one of them makes no sense.
Config& config();

// The call of that name after `after` more successful ones returns `error`, once. Kernels are
// launched by "cudaLaunchKernelEx", pinned memory with typed pointers comes from "cudaHostAlloc",
// cuBLAS has "cublasCreate", "cublasSetStream", "cublasSetWorkspace", "cublasSetMathMode" and
// "cublasGemmEx".
void fail_next(const char* api_name, cudaError_t error, int after = 0);

// A fresh device: no memory, stream, event or graph of before is left (their handles are refused),
// no failure is remembered or planned. Config stays, as do the attributes of kernels.
void reset_device();

// Allocations, streams, events and graphs that have not been released.
size_t live_objects();

struct Statistics {
  std::atomic<uint64_t> launches{0};
  std::atomic<uint64_t> blocks{0};
  std::atomic<uint64_t> ldmatrix_bank_conflicts{0};
  std::atomic<uint64_t> launches_before_wait{0};  // dependency_launch() before dependency_wait()
};
Statistics& statistics();

}  // namespace emulation
