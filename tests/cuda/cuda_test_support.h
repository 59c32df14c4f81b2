// Shared by the tests of the CUDA kernels. They are plain host code, so the same tests run on a
// device and, with kernels compiled for the emulation of tests/emulation, on any machine.
#pragma once

#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "cpu/convert.h"
#include "cpu/cpu_backend.h"
#include "cuda_backend.h"
#include "handles.h"
#include "kernels.h"
#include "launch.h"
#include "random.h"
#include "worst_error.h"

namespace frspec::cuda {

constexpr DType kElementTypes[] = {DType::kBF16, DType::kF16};

inline double epsilon(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return std::ldexp(1.0, -8);
    case DType::kF16:
      return std::ldexp(1.0, -11);
    default:
      return std::ldexp(1.0, -23);
  }
}

using test::Random;

// An array in device memory, of exactly its size, so that the emulation sees an access behind it.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T) + (count == 0)), "test");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { set(values); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(DeviceArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  DeviceArray& operator=(DeviceArray&&) = delete;

  void set(const std::vector<T>& values) {
    if (values.empty()) return;
    check(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
          "test upload");
    // The tests' streams do not wait for the default stream, which may be copying still.
    check(cudaStreamSynchronize(nullptr), "test upload");
  }
  std::vector<T> get(cudaStream_t stream) const {
    std::vector<T> values(count_);
    check(cudaMemcpyAsync(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost, stream),
          "test download");
    check(cudaStreamSynchronize(stream), "test");
    return values;
  }
  T* data() const { return data_; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// A row-major matrix in device memory with room behind each row, beside what it holds in fp32.
class DeviceMatrix {
 public:
  DeviceMatrix(DType dtype, int64_t rows, int64_t cols, int64_t gap = 0)
      : dtype_(dtype),
        rows_(rows),
        cols_(cols),
        stride_(cols + gap),
        values_(static_cast<size_t>(rows * stride_), 0.0f),
        memory_(values_.size() * dtype_size(dtype)) {
    upload();
  }
  DeviceMatrix(DType dtype, int64_t rows, int64_t cols, Random& random, float scale = 1.0f,
               int64_t gap = 0)
      : DeviceMatrix(dtype, rows, cols, gap) {
    for (float& value : values_) value = random.normal(scale);
    upload();
  }

  // Rounds the values to the type and sends them.
  void upload() {
    std::vector<char> packed(values_.size() * dtype_size(dtype_));
    const auto count = static_cast<int64_t>(values_.size());
    cpu::convert(packed.data(), dtype_, values_.data(), DType::kF32, count);
    cpu::convert(values_.data(), DType::kF32, packed.data(), dtype_, count);
    memory_.set(packed);
  }
  void download(cudaStream_t stream) {
    const std::vector<char> packed = memory_.get(stream);
    cpu::convert(values_.data(), DType::kF32, packed.data(), dtype_,
                 static_cast<int64_t>(values_.size()));
  }
  Tensor tensor() const { return {memory_.data(), dtype_, rows_, cols_, stride_}; }
  float* row(int64_t r) { return values_.data() + r * stride_; }
  const float* row(int64_t r) const { return values_.data() + r * stride_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  DType dtype() const { return dtype_; }

 private:
  DType dtype_;
  int64_t rows_, cols_, stride_;
  std::vector<float> values_;
  DeviceArray<char> memory_;
};

inline bool equal_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

}  // namespace frspec::cuda
