// expand_beam, build_tree and walk_tree against brute force on random pools.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "cpu_test_support.h"

namespace frspec::cpu {
namespace {

struct Candidate {
  int32_t token;
  int32_t parent;  // pool index, -1: root
  float score;
};

// A pool with the arrays around it, and the same pool kept by the test in the plain way.
struct Growth {
  Growth(int depth, int topk)
      : depth(depth),
        topk(topk),
        words((depth * topk + 63) / 64),
        tokens(static_cast<size_t>(pool_capacity(depth, topk))),
        parents(tokens.size()),
        scores(tokens.size()),
        beam(static_cast<size_t>(topk)),
        row_tokens(beam.size()),
        row_sources(beam.size()),
        row_positions(beam.size()),
        row_slots(beam.size()),
        row_prefix(beam.size()),
        ancestors(static_cast<size_t>(depth * topk * words), ~uint64_t{0}),
        pool{tokens.data(), parents.data(), scores.data(), beam.data(),
             static_cast<int64_t>(tokens.size())} {}

  int depth, topk;
  int64_t words;
  std::vector<int32_t> tokens, parents;
  std::vector<float> scores;
  std::vector<int32_t> beam, row_tokens, row_sources, row_positions, row_slots, row_prefix;
  std::vector<uint64_t> ancestors;
  DraftPool pool;
  std::vector<Candidate> plain;
  std::map<int32_t, int> in_flight;  // pool index of a beam node -> its in-flight index
};

std::set<int> set_bits(const uint64_t* words, int64_t count) {
  std::set<int> bits;
  for (int b = 0; b < 64 * count; ++b) {
    if ((words[b / 64] >> (b % 64) & 1) != 0) bits.insert(b);
  }
  return bits;
}

// The best `keep` of candidates first ... end - 1: by score, then by index.
std::vector<int32_t> best_of(const std::vector<Candidate>& all, size_t first, int keep) {
  std::vector<int32_t> order(all.size() - first);
  std::iota(order.begin(), order.end(), static_cast<int32_t>(first));
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return all[static_cast<size_t>(a)].score > all[static_cast<size_t>(b)].score;
  });
  order.resize(static_cast<size_t>(keep));
  return order;
}

// partial: levels below a part of the beam, and now and then a row of values that are no numbers.
void grow(Backend& backend, Growth& g, int32_t committed, bool ties, bool partial, Random& random) {
  std::vector<int32_t> beam{-1};
  for (int level = 1; level <= g.depth; ++level) {
    const int rows = level == 1 ? 1 : partial ? 1 + static_cast<int>(random.below(g.topk)) : g.topk;
    std::vector<float> logprobs;
    std::vector<int32_t> tokens;
    for (int r = 0; r < rows; ++r) {
      std::vector<float> row;
      for (int j = 0; j < g.topk; ++j) {
        // Coarse values make ties; a drafter's list is descending.
        row.push_back(ties ? -0.5f * static_cast<float>(random.below(3))
                           : -static_cast<float>(random.uniform() * 5));
      }
      std::sort(row.begin(), row.end(), std::greater<>());
      if (partial && random.below(8) == 0) row.assign(row.size(), std::nanf(""));
      logprobs.insert(logprobs.end(), row.begin(), row.end());
      for (int j = 0; j < g.topk; ++j)
        tokens.push_back(j * 7 + static_cast<int32_t>(random.below(7)));
    }
    DraftLevel step;
    step.level = level;
    step.rows = rows;
    step.topk = g.topk;
    step.first = static_cast<int32_t>(g.plain.size());
    step.logprobs = logprobs.data();
    step.tokens = tokens.data();
    step.committed = &committed;
    step.row_tokens = g.row_tokens.data();
    step.row_sources = g.row_sources.data();
    step.row_positions = g.row_positions.data();
    step.row_slots = g.row_slots.data();
    step.row_prefix = g.row_prefix.data();
    step.ancestors = g.ancestors.data();
    step.ancestor_words = g.words;
    backend.expand_beam(g.pool, step);

    const size_t first = g.plain.size();
    for (int r = 0; r < rows; ++r) {
      const int32_t parent = beam[static_cast<size_t>(r)];
      const float base = parent < 0 ? 0.0f : g.plain[static_cast<size_t>(parent)].score;
      for (int j = 0; j < g.topk; ++j) {
        const size_t i = static_cast<size_t>(r * g.topk + j);
        const bool number = !std::isnan(logprobs[i]);
        g.plain.push_back({tokens[i], parent, number ? base + logprobs[i] : -INFINITY});
      }
    }
    const std::vector<int32_t> previous = beam;
    beam = best_of(g.plain, first, g.topk);
    for (size_t j = 0; j < beam.size(); ++j) {
      const Candidate& node = g.plain[static_cast<size_t>(beam[j])];
      const int index = (level - 1) * g.topk + static_cast<int>(j);
      g.in_flight[beam[j]] = index;
      CHECK(g.beam[j] == beam[j]);
      CHECK(g.row_tokens[j] == node.token);
      CHECK(previous[static_cast<size_t>(g.row_sources[j])] == node.parent);
      CHECK(g.row_positions[j] == committed + level - 1);
      CHECK(g.row_slots[j] == committed + index);
      CHECK(g.row_prefix[j] == committed);
      std::set<int> path;
      for (int32_t at = beam[j]; at >= 0; at = g.plain[static_cast<size_t>(at)].parent) {
        path.insert(g.in_flight.at(at));
      }
      CHECK(set_bits(g.ancestors.data() + index * g.words, g.words) == path);
    }
  }
  for (size_t i = 0; i < g.plain.size(); ++i) {
    CHECK(g.tokens[i] == g.plain[i].token);
    CHECK(g.parents[i] == g.plain[i].parent);
    CHECK(g.scores[i] == g.plain[i].score);
  }
}

struct Tree {
  explicit Tree(int32_t nodes)
      : words((nodes + 63) / 64),
        tokens(static_cast<size_t>(nodes), -1),
        parents(tokens),
        positions(tokens),
        slots(tokens),
        prefix(tokens),
        selected(tokens),
        ancestors(static_cast<size_t>(nodes * words), ~uint64_t{0}),
        view{tokens.data(), parents.data(),   positions.data(), slots.data(), prefix.data(),
             &base,         ancestors.data(), selected.data(),  words,        nodes} {}

  int64_t words;
  std::vector<int32_t> tokens, parents, positions, slots, prefix, selected;
  std::vector<uint64_t> ancestors;
  int32_t base = -1;
  DraftTree view;
};

void check_tree(Backend& backend, const Growth& g, int32_t nodes, Random& random) {
  CAPTURE(nodes);
  Tree tree(nodes);
  int32_t root = 99;
  int32_t base = 1234;
  DraftPool pool = g.pool;
  pool.capacity = static_cast<int64_t>(g.plain.size());
  backend.build_tree(tree.view, pool, {&root, &base});

  std::vector<int32_t> kept = best_of(g.plain, 0, nodes - 1);
  std::sort(kept.begin(), kept.end());
  std::map<int32_t, int32_t> node_of{{-1, 0}};
  for (size_t i = 0; i < kept.size(); ++i) node_of[kept[i]] = static_cast<int32_t>(i) + 1;
  CHECK(tree.base == base);
  for (int32_t i = 0; i < nodes; ++i) {
    const size_t at = static_cast<size_t>(i);
    const Candidate* node = i == 0 ? nullptr : &g.plain[static_cast<size_t>(kept[at - 1])];
    CHECK(tree.tokens[at] == (node == nullptr ? root : node->token));
    if (node != nullptr) REQUIRE(node_of.count(node->parent) == 1);  // ancestors are kept
    CHECK(tree.parents[at] == (node == nullptr ? -1 : node_of.at(node->parent)));
    CHECK(tree.slots[at] == base + i);
    CHECK(tree.prefix[at] == base);
    std::set<int> path;
    for (int32_t j = i; j >= 0; j = tree.parents[static_cast<size_t>(j)]) path.insert(j);
    CHECK(set_bits(tree.ancestors.data() + i * tree.words, tree.words) == path);
    CHECK(tree.positions[at] == base + static_cast<int32_t>(path.size()) - 1);
  }

  // Walk with choices that often match a child.
  for (int round = 0; round < 20; ++round) {
    std::vector<int32_t> chosen(static_cast<size_t>(nodes));
    for (int32_t i = 0; i < nodes; ++i) {
      chosen[static_cast<size_t>(i)] = static_cast<int32_t>(random.below(7 * g.topk));
      std::vector<int32_t> children;
      for (int32_t j = i + 1; j < nodes; ++j) {
        if (tree.parents[static_cast<size_t>(j)] == i) children.push_back(j);
      }
      if (!children.empty() && random.below(5) > 0) {
        const int32_t child =
            children[static_cast<size_t>(random.below(static_cast<int64_t>(children.size())))];
        chosen[static_cast<size_t>(i)] = tree.tokens[static_cast<size_t>(child)];
      }
    }
    int32_t length = -1;
    std::vector<int32_t> path(static_cast<size_t>(g.depth) + 1);
    std::vector<int32_t> emitted(path.size());
    int32_t next[2] = {-1, base};
    backend.walk_tree({&length, path.data(), emitted.data(), {&next[0], &next[1]}}, tree.view,
                      chosen.data());
    std::vector<int32_t> want{0};
    for (bool found = true; found;) {
      found = false;
      const int32_t at = want.back();
      for (int32_t j = 0; j < nodes && !found; ++j) {
        if (tree.parents[static_cast<size_t>(j)] == at &&
            tree.tokens[static_cast<size_t>(j)] == chosen[static_cast<size_t>(at)]) {
          want.push_back(j);
          found = true;
        }
      }
    }
    REQUIRE(length == static_cast<int32_t>(want.size()));
    CHECK(next[0] == chosen[static_cast<size_t>(want.back())]);
    CHECK(next[1] == base + length);
    for (size_t j = 0; j < want.size(); ++j) {
      CHECK(path[j] == want[j]);
      CHECK(emitted[j] == chosen[static_cast<size_t>(want[j])]);
    }
  }
}

}  // namespace

TEST_CASE("growing, building and walking a tree equal brute force") {
  const auto backend = make_cpu_backend(1);
  Random random(8);
  for (const auto& shape : {std::pair{1, 1}, {1, 8}, {4, 1}, {3, 4}, {6, 10}, {5, 16}}) {
    const int depth = shape.first;
    const int topk = shape.second;
    for (int round = 0; round < 12; ++round) {
      CAPTURE(depth);
      CAPTURE(topk);
      Growth g(depth, topk);
      grow(*backend, g, 41 + round, round % 2 == 1, round >= 6, random);
      for (const int32_t nodes : {1, 2, 8, 59, 60, 63, 64, 65, 100}) {
        if (nodes - 1 <= static_cast<int32_t>(g.plain.size())) {
          check_tree(*backend, g, nodes, random);
        }
      }
    }
  }
}

TEST_CASE("a tree of fixed shape holds its candidates' tokens") {
  const auto backend = make_cpu_backend(1);
  Random random(9);
  for (const int32_t nodes : {1, 2, 63, 64, 65, 256}) {
    CAPTURE(nodes);
    std::vector<int32_t> parents{-1}, candidates{0}, tokens;
    for (int32_t i = 1; i < nodes; ++i) {
      parents.push_back(static_cast<int32_t>(random.below(i)));
      candidates.push_back(static_cast<int32_t>(random.below(40)));
    }
    for (int32_t i = 0; i < 40; ++i) tokens.push_back(1000 + i);
    Tree tree(nodes);
    int32_t root = 5;
    int32_t base = 17;
    backend->build_static_tree(tree.view, {parents.data(), candidates.data()}, tokens.data(),
                               {&root, &base});
    CHECK(tree.parents == parents);
    CHECK(tree.base == 17);
    for (int32_t i = 0; i < nodes; ++i) {
      const auto at = static_cast<size_t>(i);
      CHECK(tree.tokens[at] == (i == 0 ? 5 : 1000 + candidates[at]));
      CHECK(tree.slots[at] == 17 + i);
      CHECK(tree.prefix[at] == 17);
      std::set<int> path;
      for (int32_t j = i; j >= 0; j = parents[static_cast<size_t>(j)]) path.insert(j);
      CHECK(set_bits(tree.ancestors.data() + i * tree.words, tree.words) == path);
      CHECK(tree.positions[at] == 17 + static_cast<int32_t>(path.size()) - 1);
    }
  }
}

TEST_CASE("an empty pool gives the root alone") {
  const auto backend = make_cpu_backend(1);
  Tree tree(1);
  int32_t root = 5;
  int32_t base = 17;
  backend->build_tree(tree.view, {}, {&root, &base});
  CHECK(tree.tokens[0] == 5);
  CHECK(tree.parents[0] == -1);
  CHECK(tree.positions[0] == 17);
  CHECK(tree.slots[0] == 17);
  CHECK(tree.ancestors[0] == 1);
}

}  // namespace frspec::cpu
