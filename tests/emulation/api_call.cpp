// Failures of calls: planned, remembered, and caused by bugs in kernels.
#include "api_call.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "device_memory.h"
#include "streams.h"

namespace emulation {
namespace {

struct PlannedFailure {
  std::string name;
  cudaError_t error;
  int after;
};

// Never destroyed: destructors of static objects may still call.
std::vector<PlannedFailure>& planned_failures() {
  static auto* const failures = new std::vector<PlannedFailure>;
  return *failures;
}

cudaError_t sticky_error = cudaSuccess;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t take_planned_failure(const char* name) {
  std::vector<PlannedFailure>& failures = planned_failures();
  for (auto failure = failures.begin(); failure != failures.end(); ++failure) {
    if (failure->name != name) continue;
    if (failure->after > 0) {
      --failure->after;
      continue;
    }
    const cudaError_t error = failure->error;
    failures.erase(failure);
    return error;
  }
  return cudaSuccess;
}

// What a machine without a usable device answers.
cudaError_t missing_device() {
  if (config().driver_version / 1000 < CUDART_VERSION / 1000) return cudaErrorInsufficientDriver;
  return config().device_count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

}  // namespace

std::recursive_mutex& api_mutex() {
  static auto* const mutex = new std::recursive_mutex;
  return *mutex;
}

int planned_failure(const char* name) {
  const std::lock_guard lock(api_mutex());
  config();
  return static_cast<int>(take_planned_failure(name));
}

cudaError_t error_before_call(const char* name, Need need) {
  config();  // may plan a failure
  const cudaError_t planned = take_planned_failure(name);
  if (planned != cudaSuccess) return planned;
  if (need != Need::kDevice) return cudaSuccess;
  return sticky_error != cudaSuccess ? sticky_error : missing_device();
}

cudaError_t error_of_bug(const Error& bug, Need need) {
  if (config().kernel_errors == KernelErrors::kSticky) {
    std::fprintf(stderr, "CUDA emulation: %s\n", bug.what());
    sticky_error = cudaErrorLaunchFailure;
    drop_queued_work();
    return sticky_error;
  }
  // Destructors release while another exception passes through them, often one about the same bug.
  if (need == Need::kRelease && std::uncaught_exceptions() > 0) {
    std::fprintf(stderr, "CUDA emulation: %s\n", bug.what());
    return cudaErrorLaunchFailure;
  }
  throw;
}

cudaError_t error_after_call(cudaError_t error, Need need) {
  if (need == Need::kRelease && sticky_error != cudaSuccess) error = sticky_error;
  // That work is not done yet is no error.
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

void fail_next(const char* api_name, cudaError_t error, int after) {
  const std::lock_guard lock(api_mutex());
  planned_failures().push_back({api_name, error, after});
}

size_t live_objects() {
  const std::lock_guard lock(api_mutex());
  const Registries& all = registries();
  return live_allocations() + all.streams.all().size() + all.events.all().size() +
         all.graphs.all().size() + all.executables.all().size();
}

void reset_device() {
  const std::lock_guard lock(api_mutex());
  drop_queued_work();
  forget_streams();
  free_all_memory();
  planned_failures().clear();
  sticky_error = cudaSuccess;
  last_error = cudaSuccess;
}

}  // namespace emulation

using emulation::api_mutex;

cudaError_t cudaGetLastError() {
  const std::lock_guard lock(api_mutex());
  if (emulation::sticky_error != cudaSuccess) return emulation::sticky_error;
  return std::exchange(emulation::last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  const std::lock_guard lock(api_mutex());
  return emulation::sticky_error != cudaSuccess ? emulation::sticky_error : emulation::last_error;
}
