// out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]
//
// out, x: [n, d] bf16 or fp16, rows aligned to 16 bytes; weight: [d] fp32. One block for each row;
// a thread sums every kThreads-th piece of 8 elements, the warps' sums are added in order: the bits
// of a row depend on that row alone.
#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(T* out, int64_t out_stride, const T* x, int64_t x_stride, const float* weight,
                    int d, float eps) {
  SHARED(float, warp_sums, [kThreads / kWarp]);
  dependency_launch();
  dependency_wait();
  const uint4* from = reinterpret_cast<const uint4*>(x + blockIdx.x * x_stride);
  uint4* to = reinterpret_cast<uint4*>(out + blockIdx.x * out_stride);
  const int pieces = d / 8;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < pieces; i += kThreads) {
    float values[8];
    unpack_eight<T>(from[i], values);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = __fmaf_rn(values[j], values[j], sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) sum += warp_sums[w];
  const float scale = rsqrtf(sum / static_cast<float>(d) + eps);
  for (int i = threadIdx.x; i < pieces; i += kThreads) {
    float values[8];
    unpack_eight<T>(from[i], values);
    const float4 low = reinterpret_cast<const float4*>(weight)[2 * i];
    const float4 high = reinterpret_cast<const float4*>(weight)[2 * i + 1];
    const float scales[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = values[j] * scale * scales[j];
    to[i] = pack_eight<T>(values);
  }
}

}  // namespace

void rms_norm(const Tensor& out, const Tensor& x, const float* weight, float eps,
              cudaStream_t stream) {
  FRSPEC_CHECK(out.rows == x.rows && out.cols == x.cols && out.dtype == x.dtype && x.cols > 0,
               Error, "rms_norm: out [", out.rows, ", ", out.cols, "] and x [", x.rows, ", ",
               x.cols, "] differ");
  if (x.rows == 0) return;
  check_rows("rms_norm", out);
  check_rows("rms_norm", x);
  with_element(out.dtype, "rms_norm", [&](auto element) {
    using T = decltype(element);
    launch<rms_norm_kernel<T>>({dim3(ceil_div(out.rows, 1)), dim3(kThreads), stream}, "rms_norm",
                               static_cast<T*>(out.data), out.stride, static_cast<const T*>(x.data),
                               x.stride, weight, static_cast<int>(x.cols), eps);
  });
}

}  // namespace frspec::cuda
