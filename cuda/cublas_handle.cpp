#include "cublas_handle.h"

#include "check.h"
#include "cublas.h"

namespace frspec::cuda {
namespace {

template <typename... Doing>
void check_cublas(int status, const Doing&... doing) {
  if (status == 0) return;
  const std::string message = concat(doing..., ": ", cublas_api().status_name(status));
  if (status == kCublasAllocFailed) throw MemoryPlanError(message);
  throw DeviceError(message);
}

cudaDataType_t data_type(DType dtype) {
  return dtype == DType::kF32 ? CUDA_R_32F : dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_16F;
}

}  // namespace

CublasHandle::CublasHandle(cudaStream_t stream, void* workspace) {
  const CublasApi& api = cublas_api();
  check_cublas(api.create(&handle_), "creating a cuBLAS handle");
  try {
    // A change of the stream would end the workspace.
    check_cublas(api.set_stream(handle_, stream), "setting cuBLAS's stream");
    check_cublas(api.set_workspace(handle_, workspace, kCublasWorkspaceBytes),
                 "setting cuBLAS's workspace");
    // By default the parts of a split k may be added in the type of the result.
    check_cublas(api.set_math_mode(handle_, kCublasSumsOnlyInFp32), "setting cuBLAS's math mode");
  } catch (...) {
    api.destroy(handle_);
    throw;
  }
}

CublasHandle::~CublasHandle() { cublas_api().destroy(handle_); }

void CublasHandle::multiply(const Tensor& out, const Tensor& x, const void* w, float beta) const {
  const float one = 1.0f;
  const auto in_features = static_cast<int>(x.cols);
  // Row-major out [n, o] is column-major [o, n].
  const int status = cublas_api().gemm_ex(
      handle_, kCublasTranspose, kCublasNoTranspose, static_cast<int>(out.cols),
      static_cast<int>(x.rows), in_features, &one, w, data_type(x.dtype), in_features, x.data,
      data_type(x.dtype), static_cast<int>(x.stride), &beta, out.data, data_type(out.dtype),
      static_cast<int>(out.stride), kCublasCompute32F, kCublasDefaultAlgorithm);
  check_cublas(status, "linear: cuBLAS's product of [", x.rows, ", ", x.cols, "] and [", out.cols,
               ", ", x.cols, "]");
}

}  // namespace frspec::cuda
