#include <algorithm>
#include <cstring>

#include "check.h"
#include "cpu/cpu_backend.h"

namespace frspec::cpu {

void CpuBackend::rope_and_append(const Tensor& qkv, const KvLayer& kv, const Tensor& rope,
                                 const int32_t* positions, const int32_t* slots) {
  const int64_t head_dim = kv.head_dim;
  const int64_t query_heads = head_dim > 0 ? qkv.cols / head_dim - 2 * kv.heads : 0;
  FRSPEC_CHECK(kv.dtype == DType::kF32 && query_heads > 0 &&
                   (query_heads + 2 * kv.heads) * head_dim == qkv.cols && rope.cols == head_dim,
               Error, "rope_and_append: qkv has ", qkv.cols, " columns, the cache ", kv.heads,
               " heads of ", head_dim, ", the rope table ", rope.cols, " columns");
  const int64_t half = head_dim / 2;
  const int64_t head_stride = kv.slots * head_dim;
  FRSPEC_CHECK(head_dim <= kMaxHeadDim, Error, "rope_and_append: head_dim is ", head_dim,
               ", at most ", kMaxHeadDim, " is possible");
  // Fewer values than elsewhere: those of a key go to a cache line each.
  const int64_t grain = std::max<int64_t>(1, 4096 / qkv.cols);
  pool_.parallel_for(qkv.rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* cosines = rope.row<float>(positions[r]);
      const float* sines = cosines + half;
      float* q = qkv.row<float>(r);
      for (int64_t h = 0; h < query_heads; ++h) {
        kernels_.rotate(q + h * head_dim, q + h * head_dim, cosines, sines, half);
      }
      const float* k = q + query_heads * head_dim;
      const float* v = k + kv.heads * head_dim;
      const int64_t column = slots[r] % kKvBlock;
      float* keys = static_cast<float*>(kv.keys) + (slots[r] - column) * head_dim + column;
      float* values = static_cast<float*>(kv.values) + slots[r] * head_dim;
      for (int64_t h = 0; h < kv.heads; ++h) {
        float rotated[kMaxHeadDim];
        kernels_.rotate(rotated, k + h * head_dim, cosines, sines, half);
        for (int64_t d = 0; d < head_dim; ++d) keys[h * head_stride + d * kKvBlock] = rotated[d];
        std::memcpy(values + h * head_stride, v + h * head_dim,
                    static_cast<size_t>(head_dim) * sizeof(float));
      }
    }
  });
}

}  // namespace frspec::cpu
