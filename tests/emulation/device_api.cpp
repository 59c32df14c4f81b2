// The device as the CUDA runtime describes it, and what its kernels may use.
#include <cstdio>
#include <map>

#include "api_call.h"
#include "thread_block.h"

using emulation::call_api;
using emulation::config;
using emulation::Need;

namespace emulation {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr int kOldestCompute = 80;  // that kernels are compiled for

thread_local int current_device = 0;

// How much dynamic shared memory kernels have asked for. Survives reset_device(): host code asks
// once for each kernel.
std::map<const void*, size_t>& allowed_shared_bytes() {
  static auto* const bytes = new std::map<const void*, size_t>;
  return *bytes;
}

size_t allowed_for(const void* function) {
  const auto& allowed = allowed_shared_bytes();
  const auto at = allowed.find(function);
  return at == allowed.end() ? kDefaultSharedBytes : at->second;
}

bool has_kernels() {
  return config().compute_major * 10 + config().compute_minor >= kOldestCompute;
}

bool is_device(int device) { return device >= 0 && device < config().device_count; }

}  // namespace

cudaError_t check_launch(const KernelCall& call) {
  if (!has_kernels()) return cudaErrorNoKernelImageForDevice;
  const dim3& block = call.block;
  const dim3& grid = call.grid;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool valid = threads > 0 && block.x <= kMaxThreads && block.y <= kMaxThreads &&
                     block.z <= 64 && threads <= kMaxThreads && grid.x > 0 && grid.y > 0 &&
                     grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  if (!valid) return cudaErrorInvalidConfiguration;
  const bool fits = call.shared_bytes <= allowed_for(call.function) &&
                    call.shared_bytes <= config().shared_bytes_per_block;
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace emulation

using emulation::is_device;

cudaError_t cudaDriverGetVersion(int* version) {
  return call_api("cudaDriverGetVersion", Need::kNothing, [&] {
    *version = config().driver_version;
    return cudaSuccess;
  });
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  return call_api("cudaRuntimeGetVersion", Need::kNothing, [&] {
    *version = CUDART_VERSION;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDeviceCount(int* count) {
  if (count != nullptr) *count = 0;
  return call_api("cudaGetDeviceCount", Need::kDevice, [&] {
    *count = config().device_count;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDevice(int* device) {
  return call_api("cudaGetDevice", Need::kDevice, [&] {
    *device = emulation::current_device;
    return cudaSuccess;
  });
}

// All devices are one and the same.
cudaError_t cudaSetDevice(int device) {
  return call_api("cudaSetDevice", Need::kDevice, [&] {
    if (!is_device(device)) return cudaErrorInvalidDevice;
    emulation::current_device = device;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceReset() {
  return call_api("cudaDeviceReset", Need::kDevice, [&] {
    emulation::reset_device();
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return call_api("cudaDeviceGetAttribute", Need::kDevice, [&] {
    if (!is_device(device)) return cudaErrorInvalidDevice;
    switch (attribute) {
      case cudaDevAttrMultiProcessorCount:
        *value = config().multiprocessors;
        return cudaSuccess;
      case cudaDevAttrComputeCapabilityMajor:
        *value = config().compute_major;
        return cudaSuccess;
      case cudaDevAttrComputeCapabilityMinor:
        *value = config().compute_minor;
        return cudaSuccess;
      case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = static_cast<int>(emulation::kDefaultSharedBytes);
        return cudaSuccess;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = static_cast<int>(config().shared_bytes_per_block);
        return cudaSuccess;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = static_cast<int>(config().shared_bytes_per_multiprocessor);
        return cudaSuccess;
      case cudaDevAttrMaxThreadsPerBlock:
        *value = static_cast<int>(emulation::kMaxThreads);
        return cudaSuccess;
      case cudaDevAttrWarpSize:
        *value = warpSize;
        return cudaSuccess;
      default:
        return cudaErrorInvalidValue;
    }
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return call_api("cudaGetDeviceProperties", Need::kDevice, [&] {
    if (properties == nullptr) return cudaErrorInvalidValue;
    if (!is_device(device)) return cudaErrorInvalidDevice;
    cudaDeviceProp p{};
    std::snprintf(p.name, sizeof p.name, "Emulated CUDA device");
    p.totalGlobalMem = config().device_bytes;
    p.sharedMemPerBlock = emulation::kDefaultSharedBytes;
    p.sharedMemPerBlockOptin = config().shared_bytes_per_block;
    p.sharedMemPerMultiprocessor = config().shared_bytes_per_multiprocessor;
    p.regsPerBlock = 65536;
    p.regsPerMultiprocessor = 65536;
    p.warpSize = warpSize;
    p.maxThreadsPerBlock = static_cast<int>(emulation::kMaxThreads);
    p.maxThreadsPerMultiProcessor = 1536;
    p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
    p.maxThreadsDim[2] = 64;
    p.maxGridSize[0] = 0x7fffffff;
    p.maxGridSize[1] = p.maxGridSize[2] = 65535;
    p.major = config().compute_major;
    p.minor = config().compute_minor;
    p.multiProcessorCount = config().multiprocessors;
    p.l2CacheSize = 4 << 20;
    p.memoryBusWidth = 256;
    p.asyncEngineCount = 2;
    p.concurrentKernels = 1;
    p.unifiedAddressing = 1;
    p.canMapHostMemory = 1;
    *properties = p;
    return cudaSuccess;
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return call_api("cudaFuncSetAttribute", Need::kDevice, [&] {
    if (!emulation::has_kernels()) return cudaErrorNoKernelImageForDevice;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || static_cast<size_t>(value) > config().shared_bytes_per_block) {
      return cudaErrorInvalidValue;
    }
    emulation::allowed_shared_bytes()[function] = static_cast<size_t>(value);
    return cudaSuccess;
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  return call_api("cudaFuncGetAttributes", Need::kDevice, [&] {
    if (!emulation::has_kernels()) return cudaErrorNoKernelImageForDevice;
    cudaFuncAttributes a{};
    a.maxThreadsPerBlock = static_cast<int>(emulation::kMaxThreads);
    a.binaryVersion = a.ptxVersion = config().compute_major * 10 + config().compute_minor;
    a.maxDynamicSharedSizeBytes = static_cast<int>(emulation::allowed_for(function));
    *attributes = a;
    return cudaSuccess;
  });
}
