// The emulated functions of cuBLAS.
#include <vector>

#include "cublas.h"
#include "test_support.h"

namespace emulation {
namespace {

using frspec::cuda::bf16;
using frspec::cuda::CublasApi;
using frspec::cuda::fp16;
using frspec::cuda::from_float;
using frspec::cuda::to_float;

template <typename T>
std::vector<T> sequence(int count, float step) {
  std::vector<T> values;
  for (int i = 0; i < count; ++i) {
    values.push_back(from_float<T>(step * static_cast<float>(i % 17 - 8)));
  }
  return values;
}

template <typename In, typename Out>
void check_gemm(cudaDataType_t in_type, cudaDataType_t out_type, bool transpose_a,
                bool transpose_b) {
  const CublasApi& api = frspec::cuda::cublas_api();
  constexpr int m = 5, n = 7, k = 9, lda = 11, ldb = 12, ldc = 6;
  const Stream stream;
  const auto a = sequence<In>(lda * 9, 0.25f);
  const auto b = sequence<In>(ldb * 9, 0.5f);
  const auto old = sequence<Out>(ldc * n, 1.0f);
  const DeviceArray<In> device_a(a), device_b(b);
  const DeviceArray<Out> c(old);
  void* handle = nullptr;
  REQUIRE(api.create(&handle) == 0);
  REQUIRE(api.set_stream(handle, stream) == 0);
  const float alpha = 2, beta = 0.5f;
  const auto multiply = [&] {
    REQUIRE(api.gemm_ex(handle, transpose_a ? 1 : 0, transpose_b ? 1 : 0, m, n, k, &alpha,
                        device_a.data(), in_type, lda, device_b.data(), in_type, ldb, &beta,
                        c.data(), out_type, ldc, frspec::cuda::kCublasCompute32F,
                        frspec::cuda::kCublasDefaultAlgorithm) == 0);
  };
  const Graph graph(stream, multiply);
  CHECK(to_float(c.download(stream)[3]) == to_float(old[3]));
  graph.replay(stream);
  const auto found = c.download(stream);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int q = 0; q < k; ++q) {
        sum += static_cast<double>(
                   to_float(a[static_cast<size_t>(transpose_a ? i * lda + q : q * lda + i)])) *
               to_float(b[static_cast<size_t>(transpose_b ? q * ldb + j : j * ldb + q)]);
      }
      const auto at = static_cast<size_t>(j * ldc + i);
      CHECK(to_float(found[at]) ==
            to_float(from_float<Out>(static_cast<float>(2 * sum + 0.5 * to_float(old[at])))));
    }
  }
  CHECK(to_float(found[m]) == to_float(old[m]));  // behind the column
  CHECK(api.destroy(handle) == 0);
}

TEST_CASE("cuBLAS: products of all types") {
  const FreshDevice fresh;
  for (const bool transpose_a : {false, true}) {
    for (const bool transpose_b : {false, true}) {
      check_gemm<bf16, bf16>(CUDA_R_16BF, CUDA_R_16BF, transpose_a, transpose_b);
      check_gemm<bf16, float>(CUDA_R_16BF, CUDA_R_32F, transpose_a, transpose_b);
      check_gemm<fp16, fp16>(CUDA_R_16F, CUDA_R_16F, transpose_a, transpose_b);
      check_gemm<float, float>(CUDA_R_32F, CUDA_R_32F, transpose_a, transpose_b);
    }
  }
}

TEST_CASE("cuBLAS: bad arguments") {
  const FreshDevice fresh;
  const CublasApi& api = frspec::cuda::cublas_api();
  const DeviceArray<float> matrix(64);
  void* handle = nullptr;
  REQUIRE(api.create(&handle) == 0);
  const float one = 1;
  const auto status = [&](int lda, int ldb, int ldc, cudaDataType_t a_type, int compute) {
    return api.gemm_ex(handle, 1, 0, 4, 4, 8, &one, matrix.data(), a_type, lda, matrix.data(),
                       CUDA_R_32F, ldb, &one, matrix.data(), CUDA_R_32F, ldc, compute, -1);
  };
  CHECK(status(8, 8, 4, CUDA_R_32F, 68) == 0);
  CHECK(status(7, 8, 4, CUDA_R_32F, 68) == 7);
  CHECK(status(8, 7, 4, CUDA_R_32F, 68) == 7);
  CHECK(status(8, 8, 3, CUDA_R_32F, 68) == 7);
  CHECK(status(8, 8, 4, CUDA_R_16BF, 68) == 15);
  CHECK(status(8, 8, 4, CUDA_R_8I, 68) == 15);
  CHECK(status(8, 8, 4, CUDA_R_32F, 64) == 15);
  CHECK(api.set_stream(nullptr, nullptr) == 1);
  CHECK(api.set_workspace(handle, matrix.data(), 256) == 0);
  CHECK(api.set_workspace(handle, matrix.data(), 512) == 7);
  CHECK(api.set_math_mode(handle, 16) == 0);
  CHECK(api.set_math_mode(handle, 5) == 7);
  CHECK(api.set_math_mode(nullptr, 0) == 1);
  CHECK_THROWS_AS(status(40, 8, 4, CUDA_R_32F, 68), Error);
  CHECK(api.destroy(handle) == 0);
}

}  // namespace
}  // namespace emulation
