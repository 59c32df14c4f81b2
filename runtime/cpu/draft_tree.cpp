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
    const int64_t head_dim = layer.head_dim;
    for (int64_t head = 0; head < layer.heads; ++head) {
      float* keys = static_cast<float*>(layer.keys) + head * layer.slots * head_dim;
      float* values = static_cast<float*>(layer.values) + head * layer.slots * head_dim;
      const auto key = [&](int64_t slot) {  // its column; elements are kKvBlock apart
        return keys + slot / kKvBlock * kKvBlock * head_dim + slot % kKvBlock;
      };
      for (int32_t j = 0; j < *path_length; ++j) {
        if (path[j] == j) continue;
        const float* from = key(*base + path[j]);
        float* to = key(*base + j);
        for (int64_t d = 0; d < head_dim; ++d) to[d * kKvBlock] = from[d * kKvBlock];
        std::memcpy(values + (*base + j) * head_dim, values + (*base + path[j]) * head_dim,
                    static_cast<size_t>(head_dim) * sizeof(float));
      }
    }
  }
}

}  // namespace frspec::cpu
