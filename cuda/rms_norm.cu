// out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]
//
// x may be given as the parts of the product that makes it; then it is written, too.
//
// out, x: [n, d] bf16 or fp16, rows aligned to 16 bytes; weight: [d] fp32. One block for each row;
// a thread sums every kThreads-th piece of 8 elements, the warps' sums are added in order: the bits
// of a row depend on that row alone.
#include <type_traits>

#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "linear_parts.cuh"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

constexpr int kThreads = 512;

// values * scale * weight, of 8 elements.
template <typename T>
__device__ __forceinline__ uint4 scaled(const uint4& piece, float scale, const float4& low,
                                        const float4& high) {
  const float weights[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  float values[8];
  unpack_eight<T>(piece, values);
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = values[j] * scale * weights[j];
  return pack_eight<T>(values);
}

template <typename T>
__device__ __forceinline__ float add_squares(float sum, const uint4& piece) {
  float values[8];
  unpack_eight<T>(piece, values);
#pragma unroll
  for (int j = 0; j < 8; ++j) sum = __fmaf_rn(values[j], values[j], sum);
  return sum;
}

// kParts: x is made of a product's parts, and written.
template <typename T, bool kParts>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(T* out, int64_t out_stride, T* x, int64_t x_stride, const float* weight, int d,
                    float eps, const LinearParts parts) {
  SHARED(float, warp_sums, [kThreads / kWarp]);
  dependency_launch();
  const float4* weights = reinterpret_cast<const float4*>(weight);
  const int pieces = d / 8;
  const int own = threadIdx.x;  // the piece that stays in registers; others are read twice
  float4 low = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float4 high = low;
  if (own < pieces) {  // weights depend on no kernel
    low = weights[2 * own];
    high = weights[2 * own + 1];
  }
  dependency_wait();
  uint4* from = reinterpret_cast<uint4*>(x + blockIdx.x * x_stride);
  uint4* to = reinterpret_cast<uint4*>(out + blockIdx.x * out_stride);
  uint4 held = make_uint4(0, 0, 0, 0);
  float sum = 0.0f;
#pragma unroll 1
  for (int i = own; i < pieces; i += kThreads) {
    uint4 piece;
    if constexpr (kParts) {
      piece = part_outputs<T>(parts, blockIdx.x, i * 8);
      from[i] = piece;
    } else {
      piece = from[i];
    }
    if (i == own) held = piece;
    sum = add_squares<T>(sum, piece);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) sum += warp_sums[w];
  const float scale = rsqrtf(sum / static_cast<float>(d) + eps);
  if (own < pieces) to[own] = scaled<T>(held, scale, low, high);
#pragma unroll 1
  for (int i = own + kThreads; i < pieces; i += kThreads) {
    to[i] = scaled<T>(from[i], scale, weights[2 * i], weights[2 * i + 1]);
  }
}

}  // namespace

void rms_norm(const Tensor& out, const Tensor& x, const float* weight, float eps,
              const LinearParts* parts, cudaStream_t stream) {
  FRSPEC_CHECK(out.rows == x.rows && out.cols == x.cols && out.dtype == x.dtype && x.cols > 0,
               Error, "rms_norm: out [", out.rows, ", ", out.cols, "] and x [", x.rows, ", ",
               x.cols, "] differ");
  if (x.rows == 0) return;
  check_rows("rms_norm", out);
  check_rows("rms_norm", x);
  FRSPEC_CHECK(parts == nullptr || parts->residual == nullptr ||
                   (parts->residual_stride % 8 == 0 &&
                    reinterpret_cast<uintptr_t>(parts->residual) % 16 == 0),
               Error, "rms_norm: the residual's rows are not aligned to 16 bytes");
  with_element(out.dtype, "rms_norm", [&](auto element) {
    using T = decltype(element);
    const auto launch_with = [&](auto has_parts) {
      launch<rms_norm_kernel<T, has_parts.value>>(
          {dim3(ceil_div(out.rows, 1)), dim3(kThreads), stream}, "rms_norm",
          static_cast<T*>(out.data), out.stride, static_cast<T*>(x.data), x.stride, weight,
          static_cast<int>(x.cols), eps, parts == nullptr ? LinearParts{} : *parts);
    };
    if (parts == nullptr) return launch_with(std::false_type{});
    launch_with(std::true_type{});
  });
}

}  // namespace frspec::cuda
