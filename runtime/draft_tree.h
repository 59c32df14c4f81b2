// The draft tree: growing a beam (EAGLE-2, arXiv 2406.16858, section 4.1) and keeping the best
// nodes (section 4.2), or filling a tree of fixed shape (Medusa, arXiv 2401.10774, section 2.1.2),
// and walking the tree after verification.
//
// What is done for each candidate and each node is written once, as inline functions over plain
// pointers that do not depend on the order in which they are called: the CPU backend calls them in
// a loop, the CUDA backend from the threads of one block. How the best of many are found is the
// backend's own. Candidates live in a pool, level by level; a node's parent has a lower index than
// the node, in the pool and in the tree.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace frspec {

class Arena;

constexpr int kMaxTreeNodes = 256;
constexpr int kMaxTreeDepth = 32;
constexpr int kMaxTreeTopK = 64;

// What shape of tree to draft. `tokens` counts the root.
struct TreeShape {
  int depth = 6;    // levels of drafted tokens
  int topk = 10;    // beam width, and candidates per beam node
  int tokens = 60;  // nodes of the verified tree, root included
  // Of a node's path, as the drafter sees it: nodes below it are neither verified nor drafted from,
  // so that a round is as deep and as wide as it is likely to pay. 0: all trees have the same
  // shape.
  double min_probability = 0.0;
};

// A further level is drafted when the best path so far is this many times min_probability: a level
// costs a pass of the drafter and its head, a node a row among others.
constexpr double kLevelOverNode = 4.0;

// The least scores, logarithms of probabilities, that a min_probability asks for.
struct ScoreLimits {
  float node;   // of a node's path
  float level;  // of the best path, for a further level below it
};
ScoreLimits score_limits(double min_probability);

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
  int rows = 1;   // drafter rows that were expanded: 1 at level 1, then up to topk
  int topk = 1;
  int32_t first = 0;                   // pool index of the level's first candidate
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

// Its arrays, for `nodes` nodes.
DraftTree layout_tree(Arena& arena, const char* plan_name, int32_t nodes);

// A tree whose shape does not depend on the candidates that were found for each level.
struct StaticTree {
  const int32_t* parents = nullptr;     // [nodes] parents[0] = -1, parents[i] < i
  const int32_t* candidates = nullptr;  // [nodes] which candidate the node holds; not the root's
};

struct TreeRoot {
  int32_t* token = nullptr;  // [1] the newest token, not yet in the target's KV cache
  int32_t* base = nullptr;   // [1] committed length of the target: the root's position and slot
};

// The accepted path. emitted[j] is the target's token after node path[j]: the accepted draft tokens
// and then one more, which is the next root.
struct TreeWalk {
  int32_t* length = nullptr;   // [1] nodes on the path, root included
  int32_t* path = nullptr;     // [depth + 1]
  int32_t* emitted = nullptr;  // [depth + 1]
  TreeRoot root;               // becomes the next round's
};

// Whether candidate a is to be kept before candidate b: the higher score, then the earlier index. A
// score never increases along a path, so this order keeps the ancestors of every kept node.
FRSPEC_HOST_DEVICE inline bool keeps_before(const float* scores, int32_t a, int32_t b) {
  return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
}

// Candidate `index` of the level, below rows topk: the index % topk best of expanded row
// index / topk.
FRSPEC_HOST_DEVICE inline void add_candidate(const DraftPool& pool, const DraftLevel& level,
                                             int index) {
  const int32_t parent = level.level == 1 ? -1 : pool.beam[index / level.topk];
  const int32_t node = level.first + index;
  pool.tokens[node] = level.tokens[index];
  pool.parents[node] = parent;
  const float score = (parent < 0 ? 0.0f : pool.scores[parent]) + level.logprobs[index];
  // What is no number (of damaged weights) comes last, so that there is an order.
  pool.scores[node] = score == score ? score : -INFINITY;
}

// The drafter's input of beam node j, which is pool.beam[j] now.
FRSPEC_HOST_DEVICE inline void write_beam_row(const DraftPool& pool, const DraftLevel& level,
                                              int j) {
  const int topk = level.topk;
  const int32_t node = pool.beam[j];
  const int source = (node - level.first) / topk;
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

// Node `node` of the tree whose kept candidates are tree.selected[1 ... nodes - 1], ascending.
FRSPEC_HOST_DEVICE inline void write_tree_node(const DraftTree& tree, const DraftPool& pool,
                                               const TreeRoot& root, int32_t node) {
  uint64_t* own = tree.ancestors + node * tree.ancestor_words;
  for (int64_t word = 0; word < tree.ancestor_words; ++word) own[word] = 0;
  own[0] |= 1;  // the root is everybody's
  own[node / 64] |= uint64_t{1} << (node % 64);
  int32_t parent = node == 0 ? -1 : 0;
  int32_t depth = node == 0 ? 0 : 1;
  int32_t candidate = node == 0 ? -1 : pool.parents[tree.selected[node]];
  while (candidate >= 0) {
    int32_t low = 1;  // ancestors of a kept candidate are kept, and come before it
    int32_t high = node - 1;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (tree.selected[middle] < candidate) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (parent == 0) parent = low;
    own[low / 64] |= uint64_t{1} << (low % 64);
    ++depth;
    candidate = pool.parents[candidate];
  }
  tree.tokens[node] = node == 0 ? *root.token : pool.tokens[tree.selected[node]];
  tree.parents[node] = parent;
  tree.positions[node] = *root.base + depth;
  tree.slots[node] = *root.base + node;
  tree.prefix[node] = *root.base;
  if (node == 0) *tree.base = *root.base;
}

// Marks a node's ancestors, itself included, going up by parents[node], -1 of the root. Returns its
// depth.
FRSPEC_HOST_DEVICE inline int32_t mark_ancestors(const DraftTree& tree, const int32_t* parents,
                                                 int32_t node) {
  uint64_t* own = tree.ancestors + node * tree.ancestor_words;
  for (int64_t word = 0; word < tree.ancestor_words; ++word) own[word] = 0;
  int32_t depth = -1;
  for (int32_t at = node; at >= 0; at = parents[at]) {
    own[at / 64] |= uint64_t{1} << (at % 64);
    ++depth;
  }
  return depth;
}

// Node `node` of a tree of fixed shape. tokens: of the candidates.
FRSPEC_HOST_DEVICE inline void write_static_node(const DraftTree& tree, const StaticTree& shape,
                                                 const int32_t* tokens, const TreeRoot& root,
                                                 int32_t node) {
  const int32_t depth = mark_ancestors(tree, shape.parents, node);
  tree.tokens[node] = node == 0 ? *root.token : tokens[shape.candidates[node]];
  tree.parents[node] = shape.parents[node];
  tree.positions[node] = *root.base + depth;
  tree.slots[node] = *root.base + node;
  tree.prefix[node] = *root.base;
  if (node == 0) *tree.base = *root.base;
}

// Whether the target chose this node's token after the node's parent. Siblings hold different
// tokens, so at most one child of a node does.
FRSPEC_HOST_DEVICE inline bool continues_parent(const DraftTree& tree, const int32_t* chosen,
                                                int32_t node) {
  return node > 0 && tree.tokens[node] == chosen[tree.parents[node]];
}

// Walks from the root: next(node) is the child that continues it, or -1.
template <typename Next>
FRSPEC_HOST_DEVICE inline void follow_path(const TreeWalk& walk, const int32_t* chosen,
                                           const Next& next) {
  int32_t length = 0;
  for (int32_t node = 0; node >= 0; node = next(node)) {
    walk.path[length] = node;
    walk.emitted[length] = chosen[node];
    ++length;
  }
  *walk.length = length;
  *walk.root.token = walk.emitted[length - 1];
  *walk.root.base += length;
}

}  // namespace frspec
