// The tree: the shared functions of draft_tree.h, and the KV rows of the accepted path.
#include <algorithm>
#include <numeric>
#include <utility>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/kv_layout.h"
#include "draft_tree.h"

namespace frspec::cpu {

namespace {

// Moves element `at` of the heap down; the root of the heap is the candidate that would be dropped
// first.
void sift_down(const float* scores, int32_t* heap, int size, int at) {
  for (;;) {
    int last = at;
    for (int child = 2 * at + 1; child <= 2 * at + 2 && child < size; ++child) {
      if (keeps_before(scores, heap[last], heap[child])) last = child;
    }
    if (last == at) return;
    std::swap(heap[at], heap[last]);
    at = last;
  }
}

// Writes to `kept` the indices first ... first + count - 1 that are the `keep` best, best first.
void keep_best(const float* scores, int32_t first, int count, int keep, int32_t* kept) {
  if (keep <= 0) return;
  for (int i = 0; i < keep; ++i) kept[i] = first + i;
  for (int i = keep / 2 - 1; i >= 0; --i) sift_down(scores, kept, keep, i);
  for (int32_t i = first + keep; i < first + count; ++i) {
    if (!keeps_before(scores, i, kept[0])) continue;
    kept[0] = i;
    sift_down(scores, kept, keep, 0);
  }
  for (int size = keep - 1; size > 0; --size) {
    std::swap(kept[0], kept[size]);
    sift_down(scores, kept, size, 0);
  }
}

// Copies keys and values.
template <typename Layout>
void copy_slot(const KvLayer& layer, int64_t from, int64_t to) {
  using Element = typename Layout::Element;
  const int64_t head_dim = layer.head_dim;
  const int64_t head_elements = Layout::head_elements(layer.slots, head_dim);
  for (int64_t head = 0; head < layer.heads; ++head) {
    Element* keys = static_cast<Element*>(layer.keys) + head * head_elements;
    Element* values = static_cast<Element*>(layer.values) + head * head_elements;
    for (int64_t d = 0; d < head_dim; ++d) {
      keys[Layout::key(head_dim, to, d)] = keys[Layout::key(head_dim, from, d)];
      values[Layout::value(head_dim, to, d)] = values[Layout::value(head_dim, from, d)];
    }
  }
}

}  // namespace

void CpuBackend::number_rows(int32_t* positions, int32_t* prefix, const int32_t* end, int64_t n) {
  const int32_t first = *end - static_cast<int32_t>(n);
  std::iota(positions, positions + n, first);
  std::iota(prefix, prefix + n, first + 1);
}

void CpuBackend::expand_beam(const DraftPool& pool, const DraftLevel& level) {
  const int count = level.rows * level.topk;
  for (int i = 0; i < count; ++i) add_candidate(pool, level, i);
  keep_best(pool.scores, level.first, count, level.topk, pool.beam);
  for (int j = 0; j < level.topk; ++j) write_beam_row(pool, level, j);
}

void CpuBackend::build_tree(const DraftTree& tree, const DraftPool& pool, const TreeRoot& root) {
  int32_t* selected = tree.selected + 1;
  keep_best(pool.scores, 0, static_cast<int>(pool.capacity), tree.nodes - 1, selected);
  std::sort(selected, selected + tree.nodes - 1);
  for (int32_t node = 0; node < tree.nodes; ++node) write_tree_node(tree, pool, root, node);
}

void CpuBackend::build_static_tree(const DraftTree& tree, const StaticTree& shape,
                                   const int32_t* tokens, const TreeRoot& root) {
  for (int32_t node = 0; node < tree.nodes; ++node) {
    write_static_node(tree, shape, tokens, root, node);
  }
}

void CpuBackend::walk_tree(const TreeWalk& walk, const DraftTree& tree, const int32_t* chosen) {
  follow_path(walk, chosen, [&](int32_t node) {
    for (int32_t child = node + 1; child < tree.nodes; ++child) {
      if (tree.parents[child] == node && continues_parent(tree, chosen, child)) return child;
    }
    return int32_t{-1};
  });
}

void CpuBackend::plant_tree(const DraftTree& tree, const Plant* plant) {
  for (int32_t node = 0; node < tree.nodes; ++node) plant_node(tree, *plant, node);
  for (int32_t node = 0; node < tree.nodes; ++node) relink_node(tree, *plant, node);
}

void CpuBackend::commit_kv(const KvLayer* layers, int64_t layer_count, const int32_t* base,
                           const int32_t* path, const int32_t* path_length) {
  for (int64_t l = 0; l < layer_count; ++l) {
    check_cache("commit_kv", layers[l]);
    const auto copy = layers[l].dtype == DType::kBF16 ? copy_slot<PairedKv> : copy_slot<PlainKv>;
    for (int32_t j = 0; j < *path_length; ++j) {
      if (path[j] != j) copy(layers[l], *base + path[j], *base + j);
    }
  }
}

}  // namespace frspec::cpu
