// Which tree Medusa drafts (arXiv 2401.10774, section 2.1.2): its nodes are paths of ranks, the
// path (r1, ..., rd) standing for the r_d-th best token (from 0) of head d, below the node (r1,
// ..., r_{d-1}).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "draft_tree.h"

namespace frspec {

using MedusaPath = std::vector<int32_t>;
using MedusaChoices = std::vector<MedusaPath>;

struct MedusaTreeOptions {
  // The whole tree, in any order. If there are none:
  MedusaChoices paths;
  // [heads][ranks]: how often the token of that rank is right, given that those before it are. The
  // tree of the largest expected accept length is made of them. If there are none:
  std::vector<std::vector<double>> accuracies;
  // A published tree.
  std::string published = "mc_sim_7b_63";
};

// The names of the trees that FasterDecoding/Medusa publishes.
std::vector<std::string> published_medusa_trees();

// The paths of a published tree, each before any that gains less: the first n of them are the tree
// that was found best for n nodes. RequestError for an unknown name.
MedusaChoices published_medusa_choices(const std::string& name);

// The `count` paths of the largest products of accuracies, largest first (arXiv 2401.10774, section
// 2.3.3: nodes are added by what they gain); fewer where no more gain anything. RequestError for
// accuracies outside [0, 1] or more than kMaxTreeDepth heads or kMaxTreeTopK ranks.
MedusaChoices best_medusa_choices(const std::vector<std::vector<double>>& accuracies, size_t count);

struct MedusaTree {
  int32_t depth = 0;                // heads that it uses
  int32_t width = 1;                // ranks of each that it uses
  std::vector<int32_t> parents;     // [nodes], the root first; parents[i] < i
  std::vector<int32_t> candidates;  // [nodes] (depth - 1) width + rank; 0 for the root
};

// The tree for a checkpoint of `heads` heads with `columns` columns. Paths that were given are
// taken as they are; RequestError when they are no tree, or ask for more heads or ranks than there
// are. Of a published tree or one made of accuracies, the first paths that fit into `shape`,
// `heads` and `columns` are taken.
MedusaTree plan_medusa_tree(const MedusaTreeOptions& options, const TreeShape& shape, int64_t heads,
                            int64_t columns);

}  // namespace frspec
