// Cuts attention into tasks: tiles of rows times key/value heads, and for few rows also splits of
// the logical positions. The result is the same bits for every cut (attention_kernel.h).
#include <algorithm>
#include <bit>
#include <cmath>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/kv_layout.h"
#include "cpu/workspace.h"

namespace frspec::cpu {
namespace {

// Fewer queries a task would read keys and values too often for what it does with them.
constexpr int64_t kLeastQueries = 6;

}  // namespace

size_t CpuBackend::kv_bytes(const KvLayer& layer) const {
  const int64_t elements = layer.dtype == DType::kBF16
                               ? PairedKv::head_elements(layer.slots, layer.head_dim)
                               : PlainKv::head_elements(layer.slots, layer.head_dim);
  return static_cast<size_t>(layer.heads * elements) * dtype_size(layer.dtype);
}

void CpuBackend::check_cache(const char* op, const KvLayer& kv) const {
  FRSPEC_CHECK(
      kv.dtype == DType::kF32 || (kv.dtype == DType::kBF16 && kernels_.bf16_attention != nullptr),
      Error, op, ": ", kernels_.name, " has no KV cache in ", dtype_name(kv.dtype));
}

void CpuBackend::attention(const Tensor& out, const Tensor& q, const KvLayer& kv,
                           const Visible& visible, Rows) {
  const int64_t rows = q.rows;
  const int64_t head_dim = kv.head_dim;
  const int64_t query_heads = head_dim > 0 ? q.cols / head_dim : 0;
  FRSPEC_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim, Error,
               "attention: the head dimension must be a multiple of 8 up to ", kMaxHeadDim,
               ", found ", head_dim);
  check_cache("attention", kv);
  check_output("attention", out);
  FRSPEC_CHECK(kv.heads > 0 && query_heads % kv.heads == 0 && query_heads * head_dim == q.cols &&
                   out.cols == q.cols && out.rows == rows,
               Error, "attention: q [", rows, ", ", q.cols, "] does not fit ", kv.heads,
               " key/value heads of ", head_dim);
  const int64_t heads = query_heads / kv.heads;
  FRSPEC_CHECK(heads <= kAttentionQueries, Error, "attention: ", heads,
               " query heads share a key/value head, at most ", kAttentionQueries, " may");
  FRSPEC_CHECK(kv.slots % kKvBlock == 0, Error, "attention: expected slots in blocks of ", kKvBlock,
               ", found ", kv.slots);
  for (int64_t r = 0; r < rows && visible.ancestor_words > 0; ++r) {
    int64_t ancestors = 0;
    for (int64_t word = 0; word < visible.ancestor_words; ++word) {
      ancestors += std::popcount(visible.ancestors[r * visible.ancestor_words + word]);
    }
    FRSPEC_CHECK(ancestors <= kMaxAncestors, Error, "attention: row ", r, " has ", ancestors,
                 " ancestors, at most ", kMaxAncestors, " may be");
  }
  if (rows == 0) return;

  // Large tiles share the work on keys and values, small ones keep all threads busy; cutting long
  // contexts into splits does both.
  const int64_t wanted_tasks = 4 * pool_.threads();
  const int64_t max_splits =
      std::max<int64_t>(1, (visible.max_length + kAttentionSplit - 1) / kAttentionSplit);
  const int64_t partial = head_dim + 2;
  const bool splits = pool_.threads() > 1 && max_splits > 1 &&
                      rows * query_heads * max_splits * partial <= split_partials_size_;
  const int64_t split_tasks = splits ? max_splits : 1;
  const int64_t tile = std::clamp(rows * kv.heads * split_tasks / wanted_tasks,
                                  (kLeastQueries + heads - 1) / heads, kAttentionQueries / heads);
  const int64_t tiles = (rows + tile - 1) / tile;

  const bool rounds = out.dtype == DType::kBF16;
  const auto attention = kv.dtype == DType::kBF16 ? kernels_.bf16_attention : kernels_.attention;
  const int64_t head_bytes = static_cast<int64_t>(kv_bytes(kv)) / kv.heads;
  pool_.parallel_for(
      tiles * kv.heads * split_tasks, 1, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i) {
          // Tasks beside each other, which one thread is likely to get, read the same keys.
          const int64_t row = i % tiles * tile;
          const int64_t split = i / tiles % split_tasks;
          const int64_t head = i / tiles / split_tasks;
          const int64_t column = head * heads * head_dim;
          AttentionTask task{};
          task.out = rounds ? attention_scratch_[thread].total : out.row<float>(row) + column;
          task.out_stride = rounds ? heads * head_dim : out.stride;
          task.q = q.row<float>(row) + column;
          task.q_stride = q.stride;
          task.keys = static_cast<const char*>(kv.keys) + head * head_bytes;
          task.values = static_cast<const char*>(kv.values) + head * head_bytes;
          task.prefix_length = visible.prefix_length + row;
          task.ancestor_words = visible.ancestor_words;
          if (visible.ancestor_words > 0) {
            task.ancestors = visible.ancestors + row * visible.ancestor_words;
            task.tree_base = *visible.tree_base;
          }
          task.rows = std::min(tile, rows - row);
          task.heads = heads;
          task.head_dim = head_dim;
          task.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
          task.first_split = splits ? split : 0;
          task.end_split = splits ? split + 1 : max_splits;
          if (splits) {
            task.partial_head_stride = max_splits * partial;
            task.partial_row_stride = query_heads * task.partial_head_stride;
            task.partial = split_partials_ + row * task.partial_row_stride +
                           head * heads * task.partial_head_stride + split * partial;
          }
          task.scratch = attention_scratch_ + thread;
          attention(task);
          if (rounds && !splits) {
            kernels_.round_rows(out.row<uint16_t>(row) + column, out.stride, task.out,
                                task.out_stride, task.rows, heads * head_dim);
          }
        }
      });
  if (!splits) return;
  pool_.parallel_for(rows * query_heads, 32, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / query_heads;
      const int64_t column = i % query_heads * head_dim;
      AttentionScratch& scratch = attention_scratch_[thread];
      float* to = rounds ? scratch.total : out.row<float>(row) + column;
      kernels_.merge_splits(to, split_partials_ + i * max_splits * partial, max_splits, partial,
                            head_dim, scratch.block);
      if (rounds) {
        kernels_.round_rows(out.row<uint16_t>(row) + column, 0, to, 0, 1, head_dim);
      }
    }
  });
}

}  // namespace frspec::cpu
