// What all emulated functions of the CUDA runtime have in common: one lock, failures on demand,
// the state after an error, and the last error. Internal to the emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>

#include "emulation_config.h"
#include "kernel_launch.h"

namespace emulation {

std::recursive_mutex& api_mutex();

// What a call needs to do its work. kRelease: nothing, but it reports a device that has failed.
enum class Need : uint8_t { kNothing, kDevice, kRelease };

cudaError_t error_before_call(const char* name, Need need);
// The call met a bug: rethrows it, or makes the device fail from now on.
cudaError_t error_of_bug(const Error& bug, Need need);
cudaError_t error_after_call(cudaError_t error, Need need);

// A planned failure of a call that has no cudaError_t.
int planned_failure(const char* name);

// Whether the device can run such a launch.
cudaError_t check_launch(const KernelCall& call);

template <typename Body>
cudaError_t call_api(const char* name, Need need, const Body& body) {
  const std::lock_guard lock(api_mutex());
  cudaError_t error = error_before_call(name, need);
  if (error == cudaSuccess) {
    try {
      error = body();
    } catch (const Error& bug) {
      error = error_of_bug(bug, need);
    }
  }
  return error_after_call(error, need);
}

}  // namespace emulation
