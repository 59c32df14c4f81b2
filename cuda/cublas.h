// The few functions of cuBLAS that prompts are computed with, found in the library at run time, so
// that one build runs with and without it.
#pragma once

#include <cuda_runtime.h>
#include <library_types.h>

#include <cstddef>

namespace frspec::cuda {

// Functions of libcublas with its own calling convention; 0 is success. Enumerations by value, as
// cublas_api.h has them since version 11.
struct CublasApi {
  int (*create)(void** handle);
  int (*destroy)(void* handle);
  int (*set_stream)(void* handle, cudaStream_t stream);
  int (*set_workspace)(void* handle, void* workspace, size_t bytes);
  int (*set_math_mode)(void* handle, int mode);
  // Column-major c [m, n] = alpha op(a) . op(b) + beta c.
  int (*gemm_ex)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                 const void* a, cudaDataType_t a_type, int lda, const void* b,
                 cudaDataType_t b_type, int ldb, const void* beta, void* c, cudaDataType_t c_type,
                 int ldc, int compute_type, int algorithm);
  const char* (*status_name)(int status);
};

constexpr int kCublasAllocFailed = 3;  // CUBLAS_STATUS_ALLOC_FAILED

constexpr int kCublasNoTranspose = 0;
constexpr int kCublasTranspose = 1;
constexpr int kCublasCompute32F = 68;
constexpr int kCublasSumsOnlyInFp32 = 16;  // CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
constexpr int kCublasDefaultAlgorithm = -1;

// DeviceError, naming what was looked for, when the library is not there.
const CublasApi& cublas_api();

}  // namespace frspec::cuda
