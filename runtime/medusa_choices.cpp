#include "medusa_choices.h"

#include <algorithm>
#include <map>
#include <queue>
#include <sstream>

#include "check.h"

namespace frspec {
namespace {

struct PublishedTree {
  const char* name;
  const char* paths;  // a digit for each rank
};

// From medusa/model/medusa_choices.py of FasterDecoding/Medusa.
constexpr PublishedTree kPublished[] = {
    {"mc_sim_7b_63",
     "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 "
     "12 003 40 21 004 005 0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 "
     "050 15 101 021 90 060 0001 16 070"},
    {"vicuna_7b_stage1",
     "0 00 1 2 01 10 3 02 4 000 03 5 20 04 6 05 11 001 7 30 06 8 9 010 07 08 40 002 12 09 21 "
     "50 100 003 13 020 011 004 60 14 005 22 030 31 006 70 15 101 200 007 80 0000 41 012 040 "
     "90 021 23 16 008 050 32 51"},
    {"vicuna_7b_stage1_ablation",
     "0 00 1 000 01 10 2 02 001 3 03 010 20 002 04 4 0000 100 11 003 020 05 5 30 011 06 6 "
     "004 12 0001 40 005 07 08 030 0010 101 7 200 006 21 012 50 021 09 0002 040 8 13 007 "
     "0100 110 60 9 008 009 050 0020 102 013 0003 300 31"},
    {"vicuna_7b_stage2",
     "0 00 1 01 000 10 2 02 001 03 3 010 20 4 002 04 11 100 0000 5 003 05 020 30 011 06 6 07 "
     "004 40 12 08 7 030 0001 005 21 006 101 0010 200 50 09 012 8 040 021 13 007 0002 008 "
     "110 0100 60 9 013 0003 102 050 31 0020 70 14"},
    {"vicuna_13b_stage1",
     "0 00 1 01 2 10 000 02 3 03 4 20 04 001 05 5 11 010 6 06 002 7 30 8 07 08 100 003 40 12 "
     "9 09 21 020 004 13 011 005 50 030 0000 006 60 14 200 012 31 040 101 22 007 15 70 008 "
     "80 050 009 021 110 013 41 23 16"},
    {"vicuna_13b_stage2",
     "0 00 1 000 01 10 2 02 001 010 3 03 20 002 0000 04 100 11 4 003 05 020 5 30 011 06 004 "
     "0001 07 005 12 0010 030 101 40 006 08 200 09 6 7 21 50 012 0002 8 040 0100 021 007 110 "
     "13 0020 9 008 050 0003 009 013 102 0011 300 1000"},
    {"vicuna_33b_stage1",
     "0 1 00 2 01 3 10 4 02 5 03 000 6 04 20 7 11 05 30 8 9 06 07 001 12 40 010 08 09 21 002 "
     "50 13 003 100 14 60 020 31 22 004 70 011 15 41 005 030 90 80 16 006 23 012 32 040 200 "
     "17 101 007 51 24 008 021"},
    {"vicuna_33b_stage2",
     "0 00 1 01 000 10 2 02 001 03 3 010 20 04 4 002 11 100 05 5 0000 003 30 020 06 011 6 "
     "004 07 7 12 40 8 030 005 0001 08 21 09 101 200 006 50 0010 13 012 040 007 021 9 110 "
     "0002 60 008 0100 70 013 050 14 009 31 102 22"},
    {"zephyr_stage2",
     "0 00 1 01 2 000 10 02 3 03 4 20 001 04 5 05 010 11 6 002 30 06 7 07 08 003 100 09 020 "
     "12 40 8 9 21 011 004 0000 50 030 13 005 006 60 200 101 012 040 14 31 22 007 70 021 008 "
     "013 050 15 009 110 0001 0010 41 23"},
};

std::string path_text(const MedusaPath& path) {
  constexpr size_t kShown = 8;
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < std::min(path.size(), kShown); ++i)
    text << (i == 0 ? "" : ", ") << path[i];
  text << (path.size() > kShown ? ", ...]" : "]");
  return text.str();
}

bool fits(const MedusaPath& path, int64_t depth, int64_t ranks) {
  return static_cast<int64_t>(path.size()) <= depth &&
         std::all_of(path.begin(), path.end(), [&](int32_t rank) { return rank < ranks; });
}

void check_paths(const MedusaChoices& paths, int64_t heads, int64_t columns) {
  FRSPEC_CHECK(paths.size() < kMaxTreeNodes, RequestError, "medusa_choices: expected at most ",
               kMaxTreeNodes - 1, " paths, found ", paths.size());
  const int64_t ranks = std::min<int64_t>(columns, kMaxTreeTopK);
  for (const MedusaPath& path : paths) {
    FRSPEC_CHECK(!path.empty(), RequestError,
                 "medusa_choices: expected paths of at least one rank, found an empty one (the "
                 "root is not listed)");
    FRSPEC_CHECK(static_cast<int64_t>(path.size()) <= heads, RequestError, "medusa_choices: path ",
                 path_text(path), ": expected at most ", heads, " ranks, one for each head, found ",
                 path.size());
    for (const int32_t rank : path) {
      FRSPEC_CHECK(rank >= 0 && rank < ranks, RequestError, "medusa_choices: path ",
                   path_text(path), ": expected ranks from 0 to ", ranks - 1, ", found ", rank);
    }
  }
}

MedusaChoices choose_paths(const MedusaTreeOptions& options, const TreeShape& shape, int64_t heads,
                           int64_t columns) {
  if (!options.paths.empty()) {
    check_paths(options.paths, heads, columns);
    return options.paths;
  }
  const int64_t depth = std::min<int64_t>(shape.depth, heads);
  const int64_t ranks = std::min<int64_t>(shape.topk, columns);
  const auto count = static_cast<size_t>(shape.tokens - 1);
  if (!options.accuracies.empty()) {
    auto accuracies = options.accuracies;
    if (static_cast<int64_t>(accuracies.size()) > depth) {
      accuracies.resize(static_cast<size_t>(depth));
    }
    for (auto& head : accuracies) {
      if (static_cast<int64_t>(head.size()) > ranks) head.resize(static_cast<size_t>(ranks));
    }
    return best_medusa_choices(accuracies, count);
  }
  MedusaChoices paths = published_medusa_choices(options.published);
  std::erase_if(paths, [&](const MedusaPath& path) { return !fits(path, depth, ranks); });
  if (paths.size() > count) paths.resize(count);
  return paths;
}

}  // namespace

std::vector<std::string> published_medusa_trees() {
  std::vector<std::string> names;
  for (const PublishedTree& tree : kPublished) names.emplace_back(tree.name);
  return names;
}

MedusaChoices published_medusa_choices(const std::string& name) {
  std::string known;
  for (const PublishedTree& tree : kPublished) {
    if (name == tree.name) {
      MedusaChoices paths;
      std::istringstream words(tree.paths);
      for (std::string word; words >> word;) {
        MedusaPath& path = paths.emplace_back();
        for (const char digit : word) path.push_back(digit - '0');
      }
      return paths;
    }
    known += concat(known.empty() ? "" : ", ", tree.name);
  }
  throw RequestError(concat("medusa_choices: expected one of ", known, ", found '", name, "'"));
}

MedusaChoices best_medusa_choices(const std::vector<std::vector<double>>& accuracies,
                                  size_t count) {
  FRSPEC_CHECK(accuracies.size() <= kMaxTreeDepth, RequestError,
               "medusa_choices: accuracies: expected at most ", kMaxTreeDepth, " heads, found ",
               accuracies.size());
  for (size_t head = 0; head < accuracies.size(); ++head) {
    FRSPEC_CHECK(accuracies[head].size() <= kMaxTreeTopK, RequestError,
                 "medusa_choices: accuracies of head ", head, ": expected at most ", kMaxTreeTopK,
                 " ranks, found ", accuracies[head].size());
    for (const double accuracy : accuracies[head]) {
      FRSPEC_CHECK(accuracy >= 0.0 && accuracy <= 1.0, RequestError,
                   "medusa_choices: accuracies of head ", head,
                   ": expected numbers from 0 to 1, found ", accuracy);
    }
  }
  struct Node {
    double gain;
    MedusaPath path;
    bool operator<(const Node& other) const {  // of equal gains the shorter path, the lower ranks
      if (gain != other.gain) return gain < other.gain;
      if (path.size() != other.path.size()) return path.size() > other.path.size();
      return path > other.path;
    }
  };
  std::priority_queue<Node> reachable;  // their parents are chosen
  const auto add_children = [&](double gain, const MedusaPath& parent) {
    if (parent.size() == accuracies.size()) return;
    const std::vector<double>& head = accuracies[parent.size()];
    for (size_t rank = 0; rank < head.size(); ++rank) {
      MedusaPath path = parent;
      path.push_back(static_cast<int32_t>(rank));
      if (head[rank] > 0.0) reachable.push({gain * head[rank], std::move(path)});
    }
  };
  MedusaChoices chosen;
  add_children(1.0, {});
  while (chosen.size() < count && !reachable.empty()) {
    const Node best = reachable.top();
    reachable.pop();
    add_children(best.gain, best.path);
    chosen.push_back(best.path);
  }
  return chosen;
}

MedusaTree plan_medusa_tree(const MedusaTreeOptions& options, const TreeShape& shape, int64_t heads,
                            int64_t columns) {
  MedusaChoices paths = choose_paths(options, shape, heads, columns);
  std::sort(paths.begin(), paths.end(), [](const MedusaPath& a, const MedusaPath& b) {
    return a.size() != b.size() ? a.size() < b.size() : a < b;
  });
  MedusaTree tree;
  tree.parents.push_back(-1);
  for (const MedusaPath& path : paths) {
    tree.depth = std::max(tree.depth, static_cast<int32_t>(path.size()));
    tree.width = std::max(tree.width, *std::max_element(path.begin(), path.end()) + 1);
  }
  tree.candidates.push_back(0);
  std::map<MedusaPath, int32_t> nodes{{{}, 0}};
  for (const MedusaPath& path : paths) {
    const auto parent = nodes.find(MedusaPath(path.begin(), path.end() - 1));
    FRSPEC_CHECK(parent != nodes.end(), RequestError, "medusa_choices: path ", path_text(path),
                 ": expected its parent ", path_text(MedusaPath(path.begin(), path.end() - 1)),
                 " among the paths, found none: they are not a tree");
    const auto node = static_cast<int32_t>(tree.parents.size());
    FRSPEC_CHECK(nodes.emplace(path, node).second, RequestError, "medusa_choices: path ",
                 path_text(path), ": expected every path once, found it again");
    tree.parents.push_back(parent->second);
    tree.candidates.push_back(static_cast<int32_t>(path.size() - 1) * tree.width + path.back());
  }
  return tree;
}

}  // namespace frspec
