// The tree: the shared functions of draft_tree.h, and the KV rows of the accepted path.
#include <cstring>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "draft_tree.h"

namespace frspec::cpu {

void CpuBackend::expand_beam(const DraftPool& pool, const DraftLevel& level) {
  frspec::expand_beam(pool, level);
}

void CpuBackend::build_tree(const DraftTree& tree, const DraftPool& pool, const TreeRoot& root) {
  frspec::build_tree(tree, pool, root);
}

void CpuBackend::walk_tree(const TreeWalk& walk, const DraftTree& tree, const int32_t* chosen) {
  frspec::walk_tree(walk, tree, chosen);
}

void CpuBackend::commit_kv(const KvLayer* layers, int64_t layer_count, const int32_t* base,
                           const int32_t* path, const int32_t* path_length) {
  for (int64_t l = 0; l < layer_count; ++l) {
    const KvLayer& layer = layers[l];
    const size_t row_bytes = static_cast<size_t>(layer.head_dim) * dtype_size(layer.dtype);
    for (int64_t head = 0; head < layer.heads; ++head) {
      for (void* memory : {layer.keys, layer.values}) {
        char* rows = static_cast<char*>(memory) +
                     static_cast<size_t>(head * layer.slots + *base) * row_bytes;
        for (int32_t j = 0; j < *path_length; ++j) {
          if (path[j] == j) continue;
          std::memcpy(rows + static_cast<size_t>(j) * row_bytes,
                      rows + static_cast<size_t>(path[j]) * row_bytes, row_bytes);
        }
      }
    }
  }
}

}  // namespace frspec::cpu
