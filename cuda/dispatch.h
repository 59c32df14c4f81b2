// Turns run-time values into template arguments, and checks that launchers share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"
#include "tensor.h"

namespace frspec::cuda {

// body(T{}) with the element type of a dtype that kernels exist for.
template <typename Body>
void with_element(DType dtype, const char* op, const Body& body) {
  switch (dtype) {
    case DType::kBF16:
      return body(__nv_bfloat16{});
    case DType::kF16:
      return body(__half{});
    default:
      throw Error(concat(op, ": expected bf16 or fp16, found ", dtype_name(dtype)));
  }
}

// Rows that kernels read 16 bytes at a time.
inline void check_rows(const char* op, const Tensor& t) {
  const int64_t elements = 16 / static_cast<int64_t>(dtype_size(t.dtype));
  FRSPEC_CHECK(t.cols % elements == 0 && t.stride % elements == 0 &&
                   reinterpret_cast<uintptr_t>(t.data) % 16 == 0,
               Error, op, ": rows of ", t.cols, " ", dtype_name(t.dtype), " at stride ", t.stride,
               " are not aligned to 16 bytes");
}

}  // namespace frspec::cuda
