#include <algorithm>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/kv_layout.h"

namespace frspec::cpu {
namespace {

template <typename Layout>
void append(const KvLayer& kv, int64_t head, int64_t slot, const typename Layout::Element* key,
            const typename Layout::Element* value) {
  using Element = typename Layout::Element;
  const int64_t first = head * Layout::head_elements(kv.slots, kv.head_dim);
  Element* keys = static_cast<Element*>(kv.keys) + first;
  Element* values = static_cast<Element*>(kv.values) + first;
  for (int64_t d = 0; d < kv.head_dim; ++d) {
    keys[Layout::key(kv.head_dim, slot, d)] = key[d];
    values[Layout::value(kv.head_dim, slot, d)] = value[d];
  }
}

}  // namespace

void CpuBackend::rope_and_append(const Tensor& qkv, const KvLayer& kv, const Tensor& rope,
                                 const int32_t* positions, const int32_t* slots) {
  const int64_t head_dim = kv.head_dim;
  const int64_t query_heads = head_dim > 0 ? qkv.cols / head_dim - 2 * kv.heads : 0;
  check_cache("rope_and_append", kv);
  FRSPEC_CHECK(query_heads > 0 && (query_heads + 2 * kv.heads) * head_dim == qkv.cols &&
                   rope.cols == head_dim,
               Error, "rope_and_append: qkv has ", qkv.cols, " columns, the cache ", kv.heads,
               " heads of ", head_dim, ", the rope table ", rope.cols, " columns");
  const int64_t half = head_dim / 2;
  FRSPEC_CHECK(head_dim <= kMaxHeadDim, Error, "rope_and_append: head_dim is ", head_dim,
               ", at most ", kMaxHeadDim, " is possible");
  // Fewer values than elsewhere: those of a key go to many cache lines.
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
      for (int64_t h = 0; h < kv.heads; ++h) {
        float rotated[kMaxHeadDim];
        kernels_.rotate(rotated, k + h * head_dim, cosines, sines, half);
        const float* values = v + h * head_dim;
        if (kv.dtype == DType::kF32) {
          append<PlainKv>(kv, h, slots[r], rotated, values);
        } else {
          uint16_t rounded[2][kMaxHeadDim];
          kernels_.round_rows(rounded[0], 0, rotated, 0, 1, head_dim);
          kernels_.round_rows(rounded[1], 0, values, 0, 1, head_dim);
          append<PairedKv>(kv, h, slots[r], rounded[0], rounded[1]);
        }
      }
    }
  });
}

}  // namespace frspec::cpu
