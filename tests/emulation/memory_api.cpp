// cudaMalloc, cudaMemcpy and their kin.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "api_call.h"
#include "device_memory.h"
#include "device_thread.h"
#include "streams.h"

using emulation::call_api;
using emulation::Error;
using emulation::Need;

namespace {

void check_copy(const void* destination, const void* source, size_t bytes, cudaMemcpyKind kind) {
  const bool to_device = emulation::in_device_range(destination);
  const bool from_device = emulation::in_device_range(source);
  const auto size = std::to_string(bytes) + " bytes";
  if (to_device && !emulation::in_device(destination, bytes)) {
    throw Error("copy of " + size + ": the destination is not inside one allocation");
  }
  if (from_device && !emulation::in_device(source, bytes)) {
    throw Error("copy of " + size + ": the source is not inside one allocation");
  }
  if (kind == cudaMemcpyDefault) return;
  const bool wants_to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool wants_from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (wants_to_device != to_device || wants_from_device != from_device) {
    throw Error("copy of " + size + ": its direction does not fit the pointers");
  }
}

cudaError_t copy(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind,
                 cudaStream_t stream) {
  if (!emulation::is_stream(stream)) return cudaErrorInvalidResourceHandle;
  if (bytes == 0) return cudaSuccess;
  check_copy(destination, source, bytes, kind);
  const auto is_pageable = [&](const void* p) {
    return !emulation::in_device_range(p) && !emulation::in_pinned(p, bytes);
  };
  const auto work = [=] {
    // Memory may have been freed since.
    check_copy(destination, source, bytes, kind);
    std::memmove(destination, source, bytes);
  };
  if (stream != nullptr && stream->capture != nullptr) {
    // CUDA allows it, but the buffer would have to outlive the graph.
    if (is_pageable(source) || is_pageable(destination)) {
      throw Error("a captured copy uses host memory that is not pinned");
    }
    return emulation::enqueue(stream, {nullptr, work});
  }
  if (is_pageable(source)) {  // staged before the call returns
    auto staged = std::make_shared<std::vector<char>>(static_cast<const char*>(source),
                                                      static_cast<const char*>(source) + bytes);
    return emulation::enqueue(stream, {nullptr, [=] {
                                         check_copy(destination, staged->data(), bytes, kind);
                                         std::memcpy(destination, staged->data(), bytes);
                                       }});
  }
  const cudaError_t error = emulation::enqueue(stream, {nullptr, work});
  if (error == cudaSuccess && stream != nullptr && is_pageable(destination)) {
    // The call returns when the copy is done.
    emulation::run_until(stream->queue, stream->queue->issued);
  }
  return error;
}

cudaError_t fill(void* destination, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  const auto check = [=] {
    if (!emulation::in_device(destination, bytes)) {
      throw Error("memset of " + std::to_string(bytes) + " bytes: not inside one allocation");
    }
  };
  check();
  return emulation::enqueue(stream, {nullptr, [=] {
                                       check();
                                       std::memset(destination, value, bytes);
                                     }});
}

cudaError_t allocate(void** p, size_t bytes) {
  if (p == nullptr) return cudaErrorInvalidValue;
  void* memory = bytes == 0 ? nullptr : emulation::allocate_device(bytes);
  if (bytes != 0 && memory == nullptr) return cudaErrorMemoryAllocation;
  *p = memory;
  return cudaSuccess;
}

cudaError_t allocate_host(const char* name, void** p, size_t bytes) {
  return call_api(name, Need::kDevice, [&] {
    if (p == nullptr) return cudaErrorInvalidValue;
    const cudaError_t error = emulation::check_no_capture();
    if (error != cudaSuccess) return error;
    *p = emulation::allocate_pinned(bytes);
    return *p == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
  });
}

}  // namespace

cudaError_t cudaMalloc(void** p, size_t bytes) {
  return call_api("cudaMalloc", Need::kDevice, [&] {
    const cudaError_t error = emulation::check_no_capture();
    return error != cudaSuccess ? error : allocate(p, bytes);
  });
}

cudaError_t cudaFree(void* p) {
  return call_api("cudaFree", Need::kRelease, [&] {
    if (p == nullptr) return cudaSuccess;
    const cudaError_t error = emulation::check_no_capture();
    if (error != cudaSuccess) return error;
    try {
      emulation::run_streams(true);
    } catch (...) {
      emulation::free_device(p);
      throw;
    }
    return emulation::free_device(p) ? cudaSuccess : cudaErrorInvalidValue;
  });
}

cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t stream) {
  return call_api("cudaMallocAsync", Need::kDevice, [&] {
    if (!emulation::is_stream(stream)) return cudaErrorInvalidResourceHandle;
    if (stream != nullptr && stream->capture != nullptr) return cudaErrorNotSupported;
    return allocate(p, bytes);
  });
}

cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  return call_api("cudaFreeAsync", Need::kRelease, [&] {
    return emulation::enqueue(stream, {nullptr, [=] { emulation::free_device(p); }});
  });
}

cudaError_t cudaMallocHost(void** p, size_t bytes) {
  return allocate_host("cudaMallocHost", p, bytes);
}

cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  return allocate_host("cudaHostAlloc", p, bytes);
}

cudaError_t cudaFreeHost(void* p) {
  return call_api("cudaFreeHost", Need::kRelease, [&] {
    if (p == nullptr) return cudaSuccess;
    emulation::run_streams(true);
    return emulation::free_pinned(p) ? cudaSuccess : cudaErrorInvalidValue;
  });
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return call_api("cudaMemGetInfo", Need::kDevice, [&] {
    *total = emulation::config().device_bytes;
    *free = emulation::free_device_bytes();
    return cudaSuccess;
  });
}

cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes,
                            cudaMemcpyKind kind, cudaStream_t stream) {
  return call_api("cudaMemcpyAsync", Need::kDevice,
                  [&] { return copy(destination, source, bytes, kind, stream); });
}

cudaError_t cudaMemcpy(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind) {
  return call_api("cudaMemcpy", Need::kDevice, [&] {
    const cudaError_t error = emulation::check_no_capture();
    return error != cudaSuccess ? error : copy(destination, source, bytes, kind, nullptr);
  });
}

cudaError_t cudaMemsetAsync(void* destination, int value, size_t bytes, cudaStream_t stream) {
  return call_api("cudaMemsetAsync", Need::kDevice,
                  [&] { return fill(destination, value, bytes, stream); });
}

cudaError_t cudaMemset(void* destination, int value, size_t bytes) {
  return call_api("cudaMemset", Need::kDevice, [&] {
    const cudaError_t error = emulation::check_no_capture();
    return error != cudaSuccess ? error : fill(destination, value, bytes, nullptr);
  });
}
