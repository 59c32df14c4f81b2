// Non-owning views of row-major matrices. Memory belongs to an Arena or to a mapped file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace frspec {

enum class DType : uint8_t { kF32, kF16, kBF16, kI32, kI64 };

constexpr size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kI64:
      return 8;
  }
  return 0;
}

// Names as users write them: "fp32", "fp16", "bf16", "int32", "int64".
constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "fp32";
    case DType::kF16:
      return "fp16";
    case DType::kBF16:
      return "bf16";
    case DType::kI32:
      return "int32";
    case DType::kI64:
      return "int64";
  }
  return "?";
}

// rows x cols elements; consecutive rows are `stride` elements apart (stride >= cols).
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  template <typename T>
  T* row(int64_t index) const {
    return static_cast<T*>(data) + index * stride;
  }

  Tensor row_slice(int64_t first, int64_t count) const {
    return {at(first, 0), dtype, count, cols, stride};
  }

  Tensor col_slice(int64_t first, int64_t count) const {
    return {at(0, first), dtype, rows, count, stride};
  }

 private:
  void* at(int64_t row, int64_t col) const {
    if (data == nullptr) return nullptr;
    return static_cast<char*>(data) +
           (row * stride + col) * static_cast<int64_t>(dtype_size(dtype));
  }
};

}  // namespace frspec
