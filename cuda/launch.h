// launch<kernel>(config, args...): checked, on an explicit stream; the only way kernels are
// started.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <utility>

#include "check.h"

#ifdef FRSPEC_EMULATE_CUDA
#include "cuda_emulation.h"
#endif

namespace frspec::cuda {

// DeviceError with the CUDA error's name, what it says, and what was being done; MemoryPlanError
// where memory is what was missing.
[[noreturn]] void throw_cuda_error(cudaError_t error, const char* doing);

inline void check(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) throw_cuda_error(error, doing);
}

// Of the current device.
int device_attribute(cudaDeviceAttr attribute, const char* doing);

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  cudaStream_t stream = nullptr;
  size_t shared_bytes = 0;
};

// What is known of a kernel on one device.
struct KernelState {
  std::atomic<bool> known{false};
  // Compiled with dependency_wait(). A kernel that the driver made out of older PTX is not, and
  // must not be started early.
  std::atomic<bool> overlaps{false};
  std::atomic<size_t> allowed_bytes{0};  // of dynamic shared memory
};
constexpr int kMaxDevices = 32;

// The state of a kernel on the current device, with room for `shared_bytes`. The first call loads
// the kernel.
const KernelState& prepare_kernel(KernelState (&states)[kMaxDevices], const void* kernel,
                                  size_t shared_bytes, const char* name);

// Every kernel calls dependency_launch(), most of them at once (products late, see linear.cu), and
// reads what others wrote after dependency_wait() (ptx.cuh), so that each may be launched before
// the one in front of it has ended. FRSPEC_PDL=0 in the environment launches them one after the
// other.
template <auto Kernel, typename... Args>
void launch(const LaunchConfig& config, const char* name, Args&&... args) {
  static KernelState states[kMaxDevices];
  [[maybe_unused]] const KernelState& state =
      prepare_kernel(states, reinterpret_cast<const void*>(Kernel), config.shared_bytes, name);
#ifdef FRSPEC_EMULATE_CUDA
  check(emulation::enqueue_kernel(
            emulation::make_launch<Kernel>(config.grid, config.block, config.shared_bytes,
                                           std::forward<Args>(args)...),
            config.stream),
        name);
#else
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.shared_bytes;
  launch_config.stream = config.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  launch_config.attrs = &attribute;
  launch_config.numAttrs = state.overlaps ? 1 : 0;
  check(cudaLaunchKernelEx(&launch_config, Kernel, std::forward<Args>(args)...), name);
#endif
}

inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace frspec::cuda
