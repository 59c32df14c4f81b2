#include <algorithm>
#include <cstring>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/kv_layout.h"

namespace frspec::cpu {
namespace {

constexpr int64_t kRowBlock = 64;

// Key and value of one head, [D] each, into a slot. Elements whose places follow each other by the
// same step are taken together: what a place is made of is worked out once for all of them.
template <typename Layout>
void append(const KvLayer& kv, int64_t head, int64_t slot, const typename Layout::Element* key,
            const typename Layout::Element* value) {
  using Element = typename Layout::Element;
  const int64_t first = head * Layout::head_elements(kv.slots, kv.head_dim);
  Element* keys = static_cast<Element*>(kv.keys) + first + Layout::key(kv.head_dim, slot, 0);
  Element* values = static_cast<Element*>(kv.values) + first;
  constexpr int64_t kKeyStep = Layout::key(0, 0, Layout::kKeyRun);
  for (int64_t d = 0; d < kv.head_dim; d += Layout::kKeyRun) {
    std::memcpy(keys + d / Layout::kKeyRun * kKeyStep, key + d, sizeof(Element) * Layout::kKeyRun);
  }
  constexpr int64_t kValueStep = Layout::value(0, 0, 1);
  for (int64_t d = 0; d < kv.head_dim; d += kKvPanel) {
    Element* to = values + Layout::value(kv.head_dim, slot, d);
    const int64_t count = std::min(kKvPanel, kv.head_dim - d);
    for (int64_t i = 0; i < count; ++i) to[i * kValueStep] = value[d + i];
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
  FRSPEC_CHECK(head_dim <= kMaxHeadDim && head_dim % 8 == 0, Error, "rope_and_append: head_dim is ",
               head_dim, ", expected a multiple of 8 up to ", kMaxHeadDim);
  if (qkv.rows == 0) return;
  // A task is a head of some rows, not a row: slots beside each other have elements in one cache
  // line, which two threads should not write. Keys and values come last, as among the outputs of
  // the product before: the thread that made them appends them.
  const int64_t blocks = (qkv.rows + kRowBlock - 1) / kRowBlock;
  const int64_t grain = std::max<int64_t>(1, 1024 / (qkv.rows * head_dim));
  const auto rotate_head = [&](int64_t head, int64_t first_row, int64_t end_row) {
    for (int64_t r = first_row; r < end_row; ++r) {
      const float* cosines = rope.row<float>(positions[r]);
      const float* sines = cosines + half;
      float* head_row = qkv.row<float>(r) + head * head_dim;
      if (head < query_heads) {
        kernels_.rotate(head_row, head_row, cosines, sines, half);
        continue;
      }
      const int64_t kv_head = head - query_heads;
      const float* value = head_row + kv.heads * head_dim;
      float rotated[kMaxHeadDim];
      kernels_.rotate(rotated, head_row, cosines, sines, half);
      if (kv.dtype == DType::kF32) {
        append<PlainKv>(kv, kv_head, slots[r], rotated, value);
      } else {
        uint16_t rounded[2][kMaxHeadDim];
        kernels_.round_rows(rounded[0], 0, rotated, 0, 1, head_dim);
        kernels_.round_rows(rounded[1], 0, value, 0, 1, head_dim);
        append<PairedKv>(kv, kv_head, slots[r], rounded[0], rounded[1]);
      }
    }
  };
  pool_.parallel_for((query_heads + kv.heads) * blocks, grain,
                     [&](int64_t begin, int64_t end, int) {
                       for (int64_t i = begin; i < end; ++i) {
                         const int64_t row = i % blocks * kRowBlock;
                         rotate_head(i / blocks, row, std::min(row + kRowBlock, qkv.rows));
                       }
                     });
}

}  // namespace frspec::cpu
