// The draft tree: growing a beam (EAGLE-2, arXiv 2406.16858, section 4.1), keeping the best nodes
// (section 4.2), and walking the tree after verification.
//
// Written once as inline functions over plain pointers: the CPU backend calls them directly, a CUDA
// backend calls them from one-block kernels. Candidates live in a pool, level by level; a node's
// parent has a lower index than the node, in the pool and in the tree.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace frspec {

constexpr int kMaxTreeNodes = 256;
constexpr int kMaxTreeDepth = 32;
constexpr int kMaxTreeTopK = 64;

// What shape of tree to draft. `tokens` counts the root.
struct TreeShape {
  int depth = 6;    // levels of drafted tokens
  int topk = 10;    // beam width, and candidates per beam node
  int tokens = 60;  // nodes of the verified tree, root included
};

// Candidates of the whole pool: topk at level 1, topk^2 at each further level.
constexpr int pool_capacity(int depth, int topk) { return topk + (depth - 1) * topk * topk; }

struct DraftPool {
  int32_t* tokens = nullptr;   // [capacity]
  int32_t* parents = nullptr;  // [capacity] pool index, -1: the root
  float* scores = nullptr;     // [capacity] log-probability of the path from the root
  int32_t* beam = nullptr;     // [topk] pool indices of the latest level's beam, best first
  int64_t capacity = 0;
};

// One step of growing: `rows` drafter rows have produced `topk` candidates each. The best `topk` of
// them become the next beam, whose drafter inputs are written to the row_* arrays. Row j of level l
// has in-flight index (l - 1) topk + j: its slot is committed + that index, its position committed
// + l - 1.
struct DraftLevel {
  int level = 1;  // 1-based
  int rows = 1;   // drafter rows that were expanded: 1 at level 1, then topk
  int topk = 1;
  const float* logprobs = nullptr;     // [rows, topk]
  const int32_t* tokens = nullptr;     // [rows, topk]
  const int32_t* committed = nullptr;  // [1] committed length of the drafter's KV cache
  int32_t* row_tokens = nullptr;       // [topk]
  int32_t* row_sources = nullptr;      // [topk] which expanded row the beam node came from
  int32_t* row_positions = nullptr;    // [topk]
  int32_t* row_slots = nullptr;        // [topk]
  int32_t* row_prefix = nullptr;       // [topk] = committed
  uint64_t* ancestors = nullptr;       // [depth topk, ancestor_words] by in-flight index
  int64_t ancestor_words = 0;
};

// The tree that is verified, with everything its forward pass needs. Node i sits in slot base + i.
struct DraftTree {
  int32_t* tokens = nullptr;      // [nodes]
  int32_t* parents = nullptr;     // [nodes] parents[0] = -1, parents[i] < i
  int32_t* positions = nullptr;   // [nodes] base + depth
  int32_t* slots = nullptr;       // [nodes]
  int32_t* prefix = nullptr;      // [nodes] = base
  int32_t* base = nullptr;        // [1]
  uint64_t* ancestors = nullptr;  // [nodes, ancestor_words]; a node is its own ancestor
  int32_t* selected = nullptr;    // [nodes] scratch: pool indices of the kept nodes
  int64_t ancestor_words = 0;
  int32_t nodes = 0;
};

struct TreeRoot {
  const int32_t* token = nullptr;  // [1] the newest token, not yet in the target's KV cache
  const int32_t* base =
      nullptr;  // [1] committed length of the target: the root's position and slot
  int32_t pool_size = 0;
};

// The accepted path. emitted[j] is the target's token after node path[j]: the accepted draft tokens
// and then one more, which is the next root.
struct TreeWalk {
  int32_t* length = nullptr;   // [1] nodes on the path, root included
  int32_t* path = nullptr;     // [depth + 1]
  int32_t* emitted = nullptr;  // [depth + 1]
};

// Whether candidate a is to be kept before candidate b: the higher score, then the earlier index. A
// score never increases along a path, so this order keeps the ancestors of every kept node.
FRSPEC_HOST_DEVICE inline bool keeps_before(const float* scores, int32_t a, int32_t b) {
  return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
}

// Moves element `at` of the heap down; the root of the heap is the candidate that would be dropped
// first.
FRSPEC_HOST_DEVICE inline void sift_down(const float* scores, int32_t* heap, int size, int at) {
  for (;;) {
    int last = at;
    for (int child = 2 * at + 1; child <= 2 * at + 2 && child < size; ++child) {
      if (keeps_before(scores, heap[last], heap[child])) last = child;
    }
    if (last == at) return;
    const int32_t moved = heap[at];
    heap[at] = heap[last];
    heap[last] = moved;
    at = last;
  }
}

// Writes to `kept` the indices first ... first + count - 1 that are the `keep` best, best first.
FRSPEC_HOST_DEVICE inline void keep_best(const float* scores, int32_t first, int count, int keep,
                                         int32_t* kept) {
  if (keep <= 0) return;
  for (int i = 0; i < keep; ++i) kept[i] = first + i;
  for (int i = keep / 2 - 1; i >= 0; --i) sift_down(scores, kept, keep, i);
  for (int32_t i = first + keep; i < first + count; ++i) {
    if (!keeps_before(scores, i, kept[0])) continue;
    kept[0] = i;
    sift_down(scores, kept, keep, 0);
  }
  for (int size = keep - 1; size > 0; --size) {
    const int32_t last = kept[0];
    kept[0] = kept[size];
    kept[size] = last;
    sift_down(scores, kept, size, 0);
  }
}

FRSPEC_HOST_DEVICE inline void expand_beam(const DraftPool& pool, const DraftLevel& level) {
  const int topk = level.topk;
  const int count = level.rows * topk;
  const int32_t first = level.level == 1 ? 0 : topk + (level.level - 2) * topk * topk;
  for (int row = 0; row < level.rows; ++row) {
    const int32_t parent = level.level == 1 ? -1 : pool.beam[row];
    const float parent_score = parent < 0 ? 0.0f : pool.scores[parent];
    for (int j = 0; j < topk; ++j) {
      const int32_t node = first + row * topk + j;
      pool.tokens[node] = level.tokens[row * topk + j];
      pool.parents[node] = parent;
      pool.scores[node] = parent_score + level.logprobs[row * topk + j];
    }
  }
  keep_best(pool.scores, first, count, topk, pool.beam);
  for (int j = 0; j < topk; ++j) {
    const int32_t node = pool.beam[j];
    const int source = (node - first) / topk;
    const int in_flight = (level.level - 1) * topk + j;
    level.row_tokens[j] = pool.tokens[node];
    level.row_sources[j] = source;
    level.row_positions[j] = *level.committed + level.level - 1;
    level.row_slots[j] = *level.committed + in_flight;
    level.row_prefix[j] = *level.committed;
    uint64_t* own = level.ancestors + in_flight * level.ancestor_words;
    const uint64_t* inherited = nullptr;
    if (level.level > 1) {
      const int parent_in_flight = (level.level - 2) * topk + source;
      inherited = level.ancestors + parent_in_flight * level.ancestor_words;
    }
    for (int64_t word = 0; word < level.ancestor_words; ++word) {
      own[word] = inherited == nullptr ? 0 : inherited[word];
    }
    own[in_flight / 64] |= uint64_t{1} << (in_flight % 64);
  }
}

FRSPEC_HOST_DEVICE inline void sort_ascending(int32_t* values, int count) {
  for (int i = 1; i < count; ++i) {
    const int32_t value = values[i];
    int at = i;
    for (; at > 0 && values[at - 1] > value; --at) values[at] = values[at - 1];
    values[at] = value;
  }
}

// tree.nodes - 1 <= root.pool_size. With an empty pool the tree is the root alone: plain decoding.
FRSPEC_HOST_DEVICE inline void build_tree(const DraftTree& tree, const DraftPool& pool,
                                          const TreeRoot& root) {
  int32_t* selected = tree.selected + 1;  // pool index of tree node i, ascending
  const int drafted = tree.nodes - 1;
  keep_best(pool.scores, 0, root.pool_size, drafted, selected);
  sort_ascending(selected, drafted);
  *tree.base = *root.base;
  for (int32_t node = 0; node < tree.nodes; ++node) {
    int32_t parent = -1;
    if (node > 0) {
      const int32_t pool_parent = pool.parents[selected[node - 1]];
      parent = 0;
      for (int32_t i = 1; i < node && pool_parent >= 0; ++i) {
        if (selected[i - 1] == pool_parent) parent = i;
      }
    }
    tree.tokens[node] = node == 0 ? *root.token : pool.tokens[selected[node - 1]];
    tree.parents[node] = parent;
    tree.positions[node] = node == 0 ? *root.base : tree.positions[parent] + 1;
    tree.slots[node] = *root.base + node;
    tree.prefix[node] = *root.base;
    uint64_t* own = tree.ancestors + node * tree.ancestor_words;
    for (int64_t word = 0; word < tree.ancestor_words; ++word) {
      own[word] = node == 0 ? 0 : tree.ancestors[parent * tree.ancestor_words + word];
    }
    own[node / 64] |= uint64_t{1} << (node % 64);
  }
}

FRSPEC_HOST_DEVICE inline void walk_tree(const TreeWalk& walk, const DraftTree& tree,
                                         const int32_t* chosen) {
  int32_t node = 0;
  int32_t length = 0;
  while (node >= 0) {
    walk.path[length] = node;
    walk.emitted[length] = chosen[node];
    ++length;
    int32_t next = -1;
    for (int32_t child = node + 1; child < tree.nodes && next < 0; ++child) {
      if (tree.parents[child] == node && tree.tokens[child] == chosen[node]) next = child;
    }
    node = next;
  }
  *walk.length = length;
}

}  // namespace frspec
