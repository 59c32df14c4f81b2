// Rotary position embedding (arXiv 2104.09864; the two halves of a head are a pair's two members)
// fused with the append to the KV cache.
//
// qkv: [n, (H + 2 K) D]; queries are rotated in place, keys rotated into the cache, values copied.
// rope: [positions, D] fp32, cosines then sines. One block for each row; a thread takes one pair of
// query or key elements, or one value, at a time.
#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rope_and_append_kernel(T* qkv, int64_t qkv_stride, T* keys, T* values, int64_t head_stride,
                           const float* rope, const int32_t* positions, const int32_t* slots,
                           int query_heads, int kv_heads, int head_dim) {
  dependency_launch();
  dependency_wait();
  T* row = qkv + blockIdx.x * qkv_stride;
  const int half = head_dim / 2;
  const float* cosines = rope + static_cast<int64_t>(positions[blockIdx.x]) * head_dim;
  const float* sines = cosines + half;
  const int64_t slot = slots[blockIdx.x];
  const int pairs = (query_heads + kv_heads) * half;
  for (int i = threadIdx.x; i < pairs; i += kThreads) {
    const int head = i / half;
    const int j = i % half;
    T* from = row + head * head_dim;
    T* to = head < query_heads ? from : keys + (head - query_heads) * head_stride + slot * head_dim;
    const float a = to_float(from[j]);
    const float b = to_float(from[j + half]);
    to[j] = from_float<T>(__fmaf_rn(a, cosines[j], -b * sines[j]));
    to[j + half] = from_float<T>(__fmaf_rn(b, cosines[j], a * sines[j]));
  }
  const T* v = row + (query_heads + kv_heads) * head_dim;
  for (int i = threadIdx.x; i < kv_heads * head_dim; i += kThreads) {
    values[i / head_dim * head_stride + slot * head_dim + i % head_dim] = v[i];
  }
}

}  // namespace

void rope_and_append(const Tensor& qkv, const KvLayer& kv, const Tensor& rope,
                     const int32_t* positions, const int32_t* slots, cudaStream_t stream) {
  with_element(qkv.dtype, "rope_and_append", [&](auto element) {
    using T = decltype(element);
    const int64_t query_heads = qkv.cols / kv.head_dim - 2 * kv.heads;
    launch<rope_and_append_kernel<T>>(
        {dim3(ceil_div(qkv.rows, 1)), dim3(kThreads), stream}, "rope_and_append",
        static_cast<T*>(qkv.data), qkv.stride, static_cast<T*>(kv.keys), static_cast<T*>(kv.values),
        kv.slots * kv.head_dim, static_cast<const float*>(rope.data), positions, slots,
        static_cast<int>(query_heads), static_cast<int>(kv.heads), static_cast<int>(kv.head_dim));
  });
}

}  // namespace frspec::cuda
