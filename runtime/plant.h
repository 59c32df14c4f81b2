// For benchmarks alone: the real drafter does its work, and then the continuation that plain
// decoding wrote is planted into its tree, so that rounds can be timed at the accept lengths of a
// trained drafter where only a random one is to be had.
//
// The first nodes of the tree become a chain that holds the recorded tokens down to a random depth
// and a wrong token below it; the other nodes stay, but for their ancestors and where they are
// right.
#pragma once

#include <cstdint>

#include "draft_tree.h"
#include "host_device.h"
#include "sampling.h"

namespace frspec {

constexpr uint64_t kPlantSeed = 0;

struct Plant {
  const int32_t* recorded = nullptr;  // [length] tokens by position in the sequence
  int32_t length = 0;
  int32_t depth = 0;        // nodes of the chain below the root
  float acceptance = 0.0f;  // probability that a node of the chain is right, if its parent is
  int32_t vocab = 0;
};

// The acceptance with which rounds emit `accept_length` (1 to depth + 1) tokens on average: those
// of acceptance a emit 1 + a + a^2 + ... + a^depth.
inline float acceptance_for(double accept_length, int32_t depth) {
  double low = 0.0;
  double high = 1.0;
  for (int step = 0; step < 60; ++step) {
    const double a = (low + high) / 2;
    double mean = 1.0;
    double power = 1.0;
    for (int32_t d = 0; d < depth; ++d) mean += power *= a;
    (mean < accept_length ? low : high) = a;
  }
  return static_cast<float>(high);
}

// How many nodes of the chain are right in the round whose root is at `base`.
FRSPEC_HOST_DEVICE inline int32_t planted_depth(const Plant& plant, int32_t base) {
  int32_t depth = 0;
  while (depth < plant.depth) {
    const RandomBlock bits =
        philox(kPlantSeed, static_cast<uint32_t>(base), static_cast<uint32_t>(depth), 2, 0);
    if (static_cast<float>(bits.words[0]) * 0x1p-32f >= plant.acceptance) break;
    ++depth;
  }
  return depth;
}

// Tokens and parents of node 1 ... plant.depth of the chain; others keep theirs.
FRSPEC_HOST_DEVICE inline void plant_node(const DraftTree& tree, const Plant& plant, int32_t node) {
  if (node < 1 || node > plant.depth || node >= tree.nodes) return;
  const int32_t base = *tree.base;
  const int32_t position = base + node;
  const int32_t right = position < plant.length ? plant.recorded[position] : 0;
  const bool accepted = node <= planted_depth(plant, base) && position < plant.length;
  tree.tokens[node] = accepted ? right : (right + 1) % plant.vocab;
  tree.parents[node] = node - 1;
}

// Ancestors and position of a node, from the parents; off the chain no node may be right, or the
// path could be longer than a draft is deep.
FRSPEC_HOST_DEVICE inline void relink_node(const DraftTree& tree, const Plant& plant,
                                           int32_t node) {
  const int32_t depth = mark_ancestors(tree, tree.parents, node);
  const int32_t position = *tree.base + depth;
  const bool right = position < plant.length && tree.tokens[node] == plant.recorded[position];
  // A node that hangs below the end of the chain may be deeper than any draft: nothing has room for
  // such a position.
  tree.positions[node] = *tree.base + (depth < plant.depth ? depth : plant.depth);
  if (node > plant.depth && right) tree.tokens[node] = (tree.tokens[node] + 1) % plant.vocab;
}

}  // namespace frspec
