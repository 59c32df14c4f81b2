// A cuBLAS handle on a stream, with workspace that is planned and not cuBLAS's own.
#pragma once

#include <cuda_runtime.h>

#include "tensor.h"

namespace frspec::cuda {

constexpr size_t kCublasWorkspaceBytes = size_t{32} << 20;  // what cuBLAS recommends for Hopper

class CublasHandle {
 public:
  // workspace: kCublasWorkspaceBytes. DeviceError.
  CublasHandle(cudaStream_t stream, void* workspace);
  ~CublasHandle();
  CublasHandle(const CublasHandle&) = delete;
  CublasHandle& operator=(const CublasHandle&) = delete;

  // out [n, o] = x [n, i] . w [o, i]^T + beta out; x and w bf16 or fp16, out the same or fp32, sums
  // fp32; w without gaps between its rows.
  void multiply(const Tensor& out, const Tensor& x, const void* w, float beta) const;

 private:
  void* handle_ = nullptr;
};

}  // namespace frspec::cuda
