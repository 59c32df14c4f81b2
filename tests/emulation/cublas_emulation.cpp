// The functions of cuBLAS by plain loops: sums in double, rounded once, in the order of the
// handle's stream.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "api_call.h"
#include "cublas.h"
#include "cuda_emulation.h"
#include "device_memory.h"
#include "streams.h"

namespace frspec::cuda {
namespace {

constexpr int kSuccess = 0;
constexpr int kNotInitialized = 1;
constexpr int kInvalidValue = 7;
constexpr int kExecutionFailed = 13;
constexpr int kNotSupported = 15;

struct Handle {
  cudaStream_t stream = nullptr;
};

size_t element_bytes(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

double load(const void* p, cudaDataType_t type, int64_t index) {
  switch (type) {
    case CUDA_R_16BF:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[index]);
    case CUDA_R_16F:
      return __half2float(static_cast<const __half*>(p)[index]);
    default:
      return static_cast<const float*>(p)[index];
  }
}

void store(void* p, cudaDataType_t type, int64_t index, double value) {
  switch (type) {
    case CUDA_R_16BF:
      static_cast<__nv_bfloat16*>(p)[index] = __double2bfloat16(value);
      return;
    case CUDA_R_16F:
      static_cast<__half*>(p)[index] = __double2half(value);
      return;
    default:
      static_cast<float*>(p)[index] = static_cast<float>(value);
  }
}

// A column-major matrix [rows, columns].
struct Matrix {
  const char* name;
  const void* data;
  cudaDataType_t type;
  int leading;
  int rows;
  int columns;

  bool valid() const { return rows >= 0 && columns >= 0 && leading >= std::max(1, rows); }

  void check() const {
    if (rows == 0 || columns == 0) return;
    const size_t elements =
        static_cast<size_t>(columns - 1) * static_cast<size_t>(leading) + static_cast<size_t>(rows);
    if (emulation::in_device(data, elements * element_bytes(type))) return;
    throw emulation::Error(std::string("cublasGemmEx: matrix ") + name +
                           " is not inside one allocation of device memory");
  }

  double at(int row, int column) const { return load(data, type, int64_t{column} * leading + row); }
};

struct Product {
  Matrix a, b, c;
  bool transpose_a, transpose_b;
  int m, n, k;
  double alpha, beta;

  void run() const {
    a.check();
    b.check();
    c.check();
    const auto depth = static_cast<size_t>(k);
    // op(b) unpacked once, rows of n: the inner loop then runs over neighbours.
    std::vector<double> factors(depth * static_cast<size_t>(n));
    for (int q = 0; q < k; ++q) {
      for (int j = 0; j < n; ++j) {
        factors[static_cast<size_t>(q) * static_cast<size_t>(n) + static_cast<size_t>(j)] =
            transpose_b ? b.at(j, q) : b.at(q, j);
      }
    }
    std::vector<double> sums(static_cast<size_t>(n));
    for (int i = 0; i < m; ++i) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int q = 0; q < k; ++q) {
        const double factor = transpose_a ? a.at(q, i) : a.at(i, q);
        const double* row = factors.data() + static_cast<size_t>(q) * static_cast<size_t>(n);
        for (size_t j = 0; j < sums.size(); ++j) sums[j] += factor * row[j];
      }
      for (int j = 0; j < n; ++j) {
        const double old = beta == 0 ? 0 : beta * c.at(i, j);
        store(const_cast<void*>(c.data), c.type, int64_t{j} * c.leading + i,
              alpha * sums[static_cast<size_t>(j)] + old);
      }
    }
  }
};

// The combinations that cublasGemmEx has for sums in fp32.
bool supported(cudaDataType_t a, cudaDataType_t b, cudaDataType_t c) {
  const bool known = a == CUDA_R_16BF || a == CUDA_R_16F || a == CUDA_R_32F;
  return known && a == b && (c == a || c == CUDA_R_32F);
}

bool is_operation(int op) { return op == kCublasNoTranspose || op == kCublasTranspose; }

int create(void** handle) {
  const int planned = emulation::planned_failure("cublasCreate");
  if (planned != kSuccess) return planned;
  *handle = new Handle;
  return kSuccess;
}

int destroy(void* handle) {
  if (handle == nullptr) return kNotInitialized;
  delete static_cast<Handle*>(handle);
  return kSuccess;
}

int set_stream(void* handle, cudaStream_t stream) {
  const int planned = emulation::planned_failure("cublasSetStream");
  if (planned != kSuccess) return planned;
  if (handle == nullptr) return kNotInitialized;
  static_cast<Handle*>(handle)->stream = stream;
  return kSuccess;
}

int set_workspace(void* handle, void* workspace, size_t bytes) {
  const int planned = emulation::planned_failure("cublasSetWorkspace");
  if (planned != kSuccess) return planned;
  if (handle == nullptr) return kNotInitialized;
  const bool aligned = reinterpret_cast<uintptr_t>(workspace) % 256 == 0;
  const std::lock_guard lock(emulation::api_mutex());
  return aligned && (bytes == 0 || emulation::in_device(workspace, bytes)) ? kSuccess
                                                                           : kInvalidValue;
}

int set_math_mode(void* handle, int mode) {
  const int planned = emulation::planned_failure("cublasSetMathMode");
  if (planned != kSuccess) return planned;
  if (handle == nullptr) return kNotInitialized;
  return mode == 0 || mode == kCublasSumsOnlyInFp32 ? kSuccess : kInvalidValue;
}

int gemm_ex(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
            cudaDataType_t a_type, int lda, const void* b, cudaDataType_t b_type, int ldb,
            const void* beta, void* c, cudaDataType_t c_type, int ldc, int compute_type,
            int algorithm) {
  if (handle == nullptr) return kNotInitialized;
  const int planned = emulation::planned_failure("cublasGemmEx");
  if (planned != kSuccess) return planned;
  if (!is_operation(op_a) || !is_operation(op_b) || alpha == nullptr || beta == nullptr) {
    return kInvalidValue;
  }
  if (compute_type != kCublasCompute32F || algorithm != kCublasDefaultAlgorithm ||
      !supported(a_type, b_type, c_type)) {
    return kNotSupported;
  }
  Product product{};
  product.transpose_a = op_a == kCublasTranspose;
  product.transpose_b = op_b == kCublasTranspose;
  product.a = {"a", a, a_type, lda, product.transpose_a ? k : m, product.transpose_a ? m : k};
  product.b = {"b", b, b_type, ldb, product.transpose_b ? n : k, product.transpose_b ? k : n};
  product.c = {"c", c, c_type, ldc, m, n};
  product.m = m;
  product.n = n;
  product.k = k;
  product.alpha = *static_cast<const float*>(alpha);
  product.beta = *static_cast<const float*>(beta);
  if (!product.a.valid() || !product.b.valid() || !product.c.valid()) return kInvalidValue;
  const cudaError_t error = emulation::call_api("", emulation::Need::kDevice, [&] {
    return emulation::enqueue(static_cast<Handle*>(handle)->stream,
                              {nullptr, [product] { product.run(); }});
  });
  return error == cudaSuccess ? kSuccess : kExecutionFailed;
}

const char* status_name(int status) {
  switch (status) {
    case kNotInitialized:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case kCublasAllocFailed:
      return "CUBLAS_STATUS_ALLOC_FAILED";
    case kInvalidValue:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case kExecutionFailed:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case kNotSupported:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "an unknown status of cuBLAS";
  }
}

}  // namespace

const CublasApi& cublas_api() {
  static constexpr CublasApi kApi{create,        destroy, set_stream, set_workspace,
                                  set_math_mode, gemm_ex, status_name};
  return kApi;
}

}  // namespace frspec::cuda
