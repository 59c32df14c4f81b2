// The second half of attention.cu: the parts of a row's softmax are merged in ascending order.
#pragma once

#include "attention_params.cuh"

namespace frspec::cuda {
namespace {

constexpr int kMergeUnroll = 4;  // parts whose values are under way at once

// A warp for each head of each row; a lane has every 32nd pair of elements.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) merge_kernel(const AttentionParams p) {
  constexpr int kPairs = (kDim + 2 * kWarp - 1) / (2 * kWarp);  // pairs of elements of a lane
  dependency_launch();
  const int lane = threadIdx.x % kWarp;
  const int at = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int row = at / p.query_heads;
  const int head = at % p.query_heads;
  // As attend_kernel, before what is in front has ended.
  const int shared = row < p.n ? shared_positions(visible_positions(p, row)) : 0;
  dependency_wait();
  if (row >= p.n) return;  // the whole warp
  const int64_t heads = static_cast<int64_t>(p.n) * p.query_heads;
  const float2* sums = p.partial_sums + at;
  const float* values = p.partial_values + static_cast<int64_t>(at) * kDim;
  const float2 own = sums[p.ranges * heads];
  const int ranges = (shared + kRangeKeys - 1) / kRangeKeys;

  float max = own.x;
  for (int r = lane; r < ranges; r += kWarp) max = fmaxf(max, sums[r * heads].x);
  max = warp_max(max);
  float sum = 0.0f;
  float2 out[kPairs];
#pragma unroll
  for (int c = 0; c < kPairs; ++c) out[c] = make_float2(0.0f, 0.0f);
  const auto add = [&](int part) {
    const float2 of_part = sums[part * heads];
    const float factor = exp2_approximate(of_part.x - max);
    sum = __fmaf_rn(of_part.y, factor, sum);
#pragma unroll
    for (int c = 0; c < kPairs; ++c) {
      const int d = lane * 2 + 2 * kWarp * c;
      if (d >= kDim) continue;
      const float2 value = *reinterpret_cast<const float2*>(values + part * heads * kDim + d);
      out[c].x = __fmaf_rn(value.x, factor, out[c].x);
      out[c].y = __fmaf_rn(value.y, factor, out[c].y);
    }
  };
#pragma unroll kMergeUnroll
  for (int r = 0; r <= ranges; ++r) add(r < ranges ? r : p.ranges);
  const float scale = 1.0f / sum;
  T* to = static_cast<T*>(p.out) + row * p.out_stride + head * p.head_dim;
#pragma unroll
  for (int c = 0; c < kPairs; ++c) {
    const int d = lane * 2 + 2 * kWarp * c;
    if (d >= p.head_dim) continue;
    *reinterpret_cast<uint32_t*>(to + d) = pack_pair<T>(out[c].x * scale, out[c].y * scale);
  }
}

}  // namespace
}  // namespace frspec::cuda
