#include "memory.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/convert.h"
#include "launch.h"

namespace frspec::cuda {

DeviceMemory::DeviceMemory(size_t bytes) {
  const cudaError_t error = cudaMalloc(&data_, bytes);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a refused allocation spoils nothing
  size_t free = 0;
  size_t total = 0;
  cudaMemGetInfo(&free, &total);
  throw MemoryPlanError(concat("the device refused the planned ", bytes,
                               " bytes: ", cudaGetErrorName(error), "; ", free, " of its ", total,
                               " bytes are free"));
}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  return *this;
}

DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) cudaFree(data_);  // freeing nothing would make a context
}

PinnedMemory::PinnedMemory(size_t bytes) {
  check(cudaMallocHost(&data_, bytes), "allocating pinned host memory");
  std::memset(data_, 0, bytes);
}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  return *this;
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

Uploader::Uploader(cudaStream_t stream)
    : stream_(stream),
      buffers_(kBuffers * kBufferBytes),
      threads_(std::min(4, cpu::usable_threads())) {}

Uploader::~Uploader() {
  cudaStreamSynchronize(stream_);  // the buffers are still being read
}

void Uploader::upload(void* destination, DType dtype, const Tensor& source) {
  FRSPEC_CHECK(source.stride == source.cols, Error, "upload: source rows must be dense");
  const int64_t total = source.rows * source.cols;
  const auto to_bytes = static_cast<int64_t>(dtype_size(dtype));
  const auto from_bytes = static_cast<int64_t>(dtype_size(source.dtype));
  const int64_t step = static_cast<int64_t>(kBufferBytes) / to_bytes;
  constexpr int64_t kGrain = 1 << 16;  // elements that a thread moves at a time
  for (int64_t first = 0; first < total; first += step) {
    const int64_t count = std::min(step, total - first);
    check(cudaEventSynchronize(sent_[next_]), "waiting for an upload");
    char* buffer = static_cast<char*>(buffers_.data()) + static_cast<size_t>(next_) * kBufferBytes;
    const char* from = static_cast<const char*>(source.data) + first * from_bytes;
    threads_.parallel_for((count + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end, int) {
      const int64_t at = begin * kGrain;
      const int64_t n = std::min(end * kGrain, count) - at;
      if (dtype == source.dtype) {
        std::memcpy(buffer + at * to_bytes, from + at * from_bytes,
                    static_cast<size_t>(n * to_bytes));
      } else {
        cpu::convert(buffer + at * to_bytes, dtype, from + at * from_bytes, source.dtype, n);
      }
    });
    check(cudaMemcpyAsync(static_cast<char*>(destination) + first * to_bytes, buffer,
                          static_cast<size_t>(count * to_bytes), cudaMemcpyHostToDevice, stream_),
          "uploading weights");
    check(cudaEventRecord(sent_[next_], stream_), "uploading weights");
    next_ = (next_ + 1) % kBuffers;
  }
}

}  // namespace frspec::cuda
