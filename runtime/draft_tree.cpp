#include "draft_tree.h"

#include "arena.h"

namespace frspec {

ScoreLimits score_limits(double min_probability) {
  return {static_cast<float>(std::log(min_probability)),
          static_cast<float>(std::log(min_probability * kLevelOverNode))};
}

DraftTree layout_tree(Arena& arena, const char* plan_name, int32_t nodes) {
  const auto count = static_cast<size_t>(nodes);
  DraftTree tree{};
  tree.nodes = nodes;
  tree.ancestor_words = (nodes + 63) / 64;
  tree.tokens = arena.take_array<int32_t>(plan_name, count);
  tree.parents = arena.take_array<int32_t>(plan_name, count);
  tree.positions = arena.take_array<int32_t>(plan_name, count);
  tree.slots = arena.take_array<int32_t>(plan_name, count);
  tree.prefix = arena.take_array<int32_t>(plan_name, count);
  tree.base = arena.take_array<int32_t>(plan_name, 1);
  tree.ancestors =
      arena.take_array<uint64_t>(plan_name, count * static_cast<size_t>(tree.ancestor_words));
  tree.selected = arena.take_array<int32_t>(plan_name, count);
  return tree;
}

}  // namespace frspec
