// Device memory, pinned host memory, and the way of weights from one to the other.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cpu/thread_pool.h"
#include "handles.h"
#include "tensor.h"

namespace frspec::cuda {

class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(size_t bytes);  // MemoryPlanError when it cannot be had
  DeviceMemory(DeviceMemory&& other) noexcept { *this = static_cast<DeviceMemory&&>(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  ~DeviceMemory();
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Host memory that the device copies to and from without the system's help.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  explicit PinnedMemory(size_t bytes);
  PinnedMemory(PinnedMemory&& other) noexcept { *this = static_cast<PinnedMemory&&>(other); }
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;
  ~PinnedMemory();
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Brings rows from mapped files to the device: some threads read and convert into one pinned buffer
// while the others are on their way, so that disk, processor and bus work at the same time.
class Uploader {
 public:
  explicit Uploader(cudaStream_t stream);
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;

  // destination: `source` [rows, cols] of host memory, densely packed, in `dtype`.
  void upload(void* destination, DType dtype, const Tensor& source);

 private:
  static constexpr int kBuffers = 4;
  static constexpr size_t kBufferBytes = size_t{8} << 20;

  cudaStream_t stream_;
  PinnedMemory buffers_;
  FenceEvent sent_[kBuffers];
  int next_ = 0;
  cpu::ThreadPool threads_;
};

}  // namespace frspec::cuda
