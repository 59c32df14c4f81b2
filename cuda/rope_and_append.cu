// Rotary position embedding (arXiv 2104.09864; the two halves of a head are a pair's two members)
// fused with the append to the KV cache.
//
// qkv: [n, (H + 2 K) D], or the parts of the product that makes it; queries are rotated in place,
// keys rotated into the cache, values copied. rope: [positions, D] fp32, cosines then sines.
#include <type_traits>

#include "config.h"
#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "linear_parts.cuh"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

constexpr int kThreads = 128;  // as many pairs as a head may have

// grid: (n, blocks of as many heads as have kThreads pairs together). A thread has a pair.
template <typename T, bool kParts>
__global__ void __launch_bounds__(kThreads)
    rope_and_append_kernel(T* qkv, int64_t qkv_stride, T* keys, T* values, int64_t head_stride,
                           const float* rope, const int32_t* positions, const int32_t* slots,
                           int query_heads, int kv_heads, int head_dim, const LinearParts parts) {
  dependency_launch();
  const int half = head_dim / 2;
  const int heads = kThreads / half;
  const int j = threadIdx.x % half;
  const int head = blockIdx.y * heads + threadIdx.x / half;
  const bool has_pair =
      static_cast<int>(threadIdx.x) < heads * half && head < query_heads + 2 * kv_heads;
  const int row = blockIdx.x;
  T* from = qkv + row * qkv_stride + head * head_dim;
  T* to = from;
  float cosine = 1.0f;
  float sine = 0.0f;
  // Where rows are was written before the product in front, which has waited for that before it let
  // this kernel start: it is read while the product still runs (out of L2; what another grid left
  // in L1 may be older).
  if (has_pair && head >= query_heads) {
    const bool is_key = head < query_heads + kv_heads;
    const int kv_head = head - query_heads - (is_key ? 0 : kv_heads);
    to = (is_key ? keys : values) + kv_head * head_stride +
         static_cast<int64_t>(__ldcg(slots + row)) * head_dim;
  }
  if (has_pair && head < query_heads + kv_heads) {
    const float* cosines = rope + static_cast<int64_t>(__ldcg(positions + row)) * head_dim;
    cosine = cosines[j];
    sine = cosines[half + j];
  }
  dependency_wait();
  if (!has_pair) return;
  T first;
  T second;
  if constexpr (kParts) {
    first = from_float<T>(part_output<T>(parts, row, head * head_dim + j));
    second = from_float<T>(part_output<T>(parts, row, head * head_dim + j + half));
  } else {
    first = from[j];
    second = from[j + half];
  }
  if (head >= query_heads + kv_heads) {
    to[j] = first;
    to[j + half] = second;
    return;
  }
  const float a = to_float(first);
  const float b = to_float(second);
  to[j] = from_float<T>(__fmaf_rn(a, cosine, -b * sine));
  to[j + half] = from_float<T>(__fmaf_rn(b, cosine, a * sine));
}

}  // namespace

void rope_and_append(const Tensor& qkv, const KvLayer& kv, const Tensor& rope,
                     const int32_t* positions, const int32_t* slots, const LinearParts* parts,
                     cudaStream_t stream) {
  const int64_t query_heads = kv.head_dim > 0 ? qkv.cols / kv.head_dim - 2 * kv.heads : 0;
  FRSPEC_CHECK(kv.dtype == qkv.dtype && query_heads > 0 && kv.head_dim <= kMaxHeadDim &&
                   (query_heads + 2 * kv.heads) * kv.head_dim == qkv.cols &&
                   rope.cols == kv.head_dim && rope.dtype == DType::kF32,
               Error, "rope_and_append: qkv has ", qkv.cols, " columns, the cache ", kv.heads,
               " heads of ", kv.head_dim, ", the rope table ", rope.cols, " columns");
  if (qkv.rows == 0) return;
  with_element(qkv.dtype, "rope_and_append", [&](auto element) {
    using T = decltype(element);
    const auto launch_with = [&](auto has_parts) {
      launch<rope_and_append_kernel<T, has_parts.value>>(
          {dim3(static_cast<unsigned>(qkv.rows),
                ceil_div(query_heads + 2 * kv.heads, kThreads / (kv.head_dim / 2))),
           dim3(kThreads), stream},
          "rope_and_append", static_cast<T*>(qkv.data), qkv.stride, static_cast<T*>(kv.keys),
          static_cast<T*>(kv.values), kv.slots * kv.head_dim, static_cast<const float*>(rope.data),
          positions, slots, static_cast<int>(query_heads), static_cast<int>(kv.heads),
          static_cast<int>(kv.head_dim), parts == nullptr ? LinearParts{} : *parts);
    };
    if (parts == nullptr) return launch_with(std::false_type{});
    launch_with(std::true_type{});
  });
}

}  // namespace frspec::cuda
