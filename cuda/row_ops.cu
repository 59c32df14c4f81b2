// Small data movers: gathers of rows, numbering of rows, and elementwise parts of products.
#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"
#include "synthetic.h"

namespace frspec::cuda {
namespace {

constexpr int kThreads = 256;

// One block for each row, 16 bytes for each thread and step.
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(uint4* out, int64_t out_stride, const uint4* source, int64_t source_stride,
                     int64_t source_rows, const int32_t* rows, int pieces) {
  dependency_launch();
  dependency_wait();
  int64_t row = rows[blockIdx.x];
  // A row outside is a bug of the caller, but not a reason to read foreign memory.
  row = row < 0 ? 0 : row < source_rows ? row : source_rows - 1;
  uint4* to = out + blockIdx.x * out_stride;
  const uint4* from = source + row * source_stride;
  for (int i = threadIdx.x; i < pieces; i += kThreads) to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads)
    number_rows_kernel(int32_t* positions, int32_t* prefix, const int32_t* end, int n) {
  dependency_launch();
  dependency_wait();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= n) return;
  const int32_t position = *end - n + i;
  positions[i] = position;
  prefix[i] = position + 1;
}

// One block for each row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fill_rows_kernel(T* out, int64_t out_stride, const float* bias, const T* residual,
                     int64_t residual_stride, int cols) {
  dependency_launch();
  dependency_wait();
  for (int i = threadIdx.x; i < cols; i += kThreads) {
    float value = bias == nullptr ? 0.0f : bias[i];
    if (residual != nullptr) value += to_float(residual[blockIdx.x * residual_stride + i]);
    out[blockIdx.x * out_stride + i] = from_float<T>(value);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    fill_random_kernel(T* out, int64_t count, float scale, uint64_t seed) {
  dependency_launch();
  dependency_wait();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    out[i] = from_float<T>(scale * synthetic_element(seed, i));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    multiply_silu_kernel(T* up, int64_t up_stride, const T* gate, int64_t gate_stride, int cols) {
  dependency_launch();
  dependency_wait();
  for (int i = threadIdx.x; i < cols; i += kThreads) {
    const float g = to_float(gate[blockIdx.x * gate_stride + i]);
    const float u = to_float(up[blockIdx.x * up_stride + i]);
    up[blockIdx.x * up_stride + i] = from_float<T>(silu(g) * u);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_silu_kernel(T* x, int64_t x_stride, const T* y, int64_t y_stride, int cols) {
  dependency_launch();
  dependency_wait();
  for (int i = threadIdx.x; i < cols; i += kThreads) {
    const float v = to_float(y[blockIdx.x * y_stride + i]);
    T& sum = x[blockIdx.x * x_stride + i];
    sum = from_float<T>(to_float(sum) + silu(v));
  }
}

}  // namespace

void check_kernels() {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(copy_rows_kernel)),
        "looking for kernels for this GPU");
}

void copy_rows(const Tensor& out, const void* source, int64_t source_stride, int64_t source_rows,
               const int32_t* rows, cudaStream_t stream) {
  if (out.rows == 0) return;
  check_rows("copy_rows", out);
  const int64_t elements = 16 / static_cast<int64_t>(dtype_size(out.dtype));
  FRSPEC_CHECK(source_stride % elements == 0, Error, "copy_rows: source rows at stride ",
               source_stride, " are not aligned to 16 bytes");
  launch<copy_rows_kernel>({dim3(ceil_div(out.rows, 1)), dim3(kThreads), stream}, "copy_rows",
                           static_cast<uint4*>(out.data), out.stride / elements,
                           static_cast<const uint4*>(source), source_stride / elements, source_rows,
                           rows, static_cast<int>(out.cols / elements));
}

void number_rows(int32_t* positions, int32_t* prefix, const int32_t* end, int64_t n,
                 cudaStream_t stream) {
  launch<number_rows_kernel>({dim3(ceil_div(n, kThreads)), dim3(kThreads), stream}, "number_rows",
                             positions, prefix, end, static_cast<int>(n));
}

void fill_rows(const Tensor& out, const float* bias, const Tensor* residual, cudaStream_t stream) {
  with_element(out.dtype, "fill_rows", [&](auto element) {
    using T = decltype(element);
    launch<fill_rows_kernel<T>>(
        {dim3(ceil_div(out.rows, 1)), dim3(kThreads), stream}, "fill_rows",
        static_cast<T*>(out.data), out.stride, bias,
        residual == nullptr ? nullptr : static_cast<const T*>(residual->data),
        residual == nullptr ? int64_t{0} : residual->stride, static_cast<int>(out.cols));
  });
}

void fill_random(const Tensor& out, uint64_t seed, cudaStream_t stream) {
  FRSPEC_CHECK(out.stride == out.cols, Error, "fill_random: rows must be dense");
  with_element(out.dtype, "fill_random", [&](auto element) {
    using T = decltype(element);
    const int64_t count = out.rows * out.cols;
    const float scale = std::sqrt(3.0f / static_cast<float>(out.cols));
    launch<fill_random_kernel<T>>(
        {dim3(std::min(ceil_div(count, kThreads), 16384u)), dim3(kThreads), stream}, "fill_random",
        static_cast<T*>(out.data), count, scale, seed);
  });
}

void multiply_silu(const Tensor& up, const Tensor& gate, cudaStream_t stream) {
  with_element(up.dtype, "multiply_silu", [&](auto element) {
    using T = decltype(element);
    launch<multiply_silu_kernel<T>>({dim3(ceil_div(up.rows, 1)), dim3(kThreads), stream},
                                    "multiply_silu", static_cast<T*>(up.data), up.stride,
                                    static_cast<const T*>(gate.data), gate.stride,
                                    static_cast<int>(up.cols));
  });
}

void add_silu(const Tensor& x, const Tensor& y, cudaStream_t stream) {
  FRSPEC_CHECK(x.rows == y.rows && x.cols == y.cols && x.dtype == y.dtype, Error, "add_silu: x [",
               x.rows, ", ", x.cols, "] and y [", y.rows, ", ", y.cols, "] differ");
  if (x.rows == 0) return;
  with_element(x.dtype, "add_silu", [&](auto element) {
    using T = decltype(element);
    launch<add_silu_kernel<T>>({dim3(ceil_div(x.rows, 1)), dim3(kThreads), stream}, "add_silu",
                               static_cast<T*>(x.data), x.stride, static_cast<const T*>(y.data),
                               y.stride, static_cast<int>(x.cols));
  });
}

}  // namespace frspec::cuda
