// Growing, building and walking draft trees: the same as the CPU backend, field by field.
#include <algorithm>
#include <cmath>

#include "cuda_test_support.h"
#include "plant.h"

namespace frspec::cuda {
namespace {

// One memory for all arrays of a draft, at the same offsets on the host and on the device.
class Mirror {
 public:
  explicit Mirror(size_t bytes) : host_(bytes, char(0x5a)), device_(host_) {}
  template <typename T>
  size_t take(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 128 * 128;
    REQUIRE(used_ <= host_.size());
    return at;
  }
  template <typename T>
  T* host(size_t offset) {
    return reinterpret_cast<T*>(host_.data() + offset);
  }
  template <typename T>
  T* device(size_t offset) const {
    return reinterpret_cast<T*>(device_.data() + offset);
  }
  void upload() { device_.set(host_); }
  // Whether the device holds, byte for byte, what the host does.
  bool same(cudaStream_t stream) const { return device_.get(stream) == host_; }

 private:
  std::vector<char> host_;
  DeviceArray<char> device_;
  size_t used_ = 0;
};

struct Draft {
  Draft(int depth, int topk, int nodes)
      : depth(depth),
        topk(topk),
        nodes(nodes),
        words((int64_t{depth} * topk + 63) / 64),
        tree_words((nodes + 63) / 64),
        capacity(pool_capacity(depth, topk)),
        memory(1 << 21) {
    for (size_t* field : {&pool_tokens, &pool_parents, &pool_scores}) {
      *field = memory.take<int32_t>(capacity);
    }
    for (size_t* field :
         {&beam, &row_tokens, &row_sources, &row_positions, &row_slots, &row_prefix}) {
      *field = memory.take<int32_t>(topk);
    }
    ancestors = memory.take<uint64_t>(depth * topk * words);
    logprobs = memory.take<float>(topk * topk);
    candidate_tokens = memory.take<int32_t>(topk * topk);
    for (size_t* field : {&tokens, &parents, &positions, &slots, &prefix, &selected, &chosen}) {
      *field = memory.take<int32_t>(nodes);
    }
    base = memory.take<int32_t>(1);
    tree_ancestors = memory.take<uint64_t>(nodes * tree_words);
    root = memory.take<int32_t>(2);
    walk = memory.take<int32_t>(1 + 2 * (depth + 1));
  }

  // `at` gives the address of a field: on the host or on the device.
  template <typename At>
  DraftPool pool(const At& at) {
    return {at(int32_t{}, pool_tokens), at(int32_t{}, pool_parents), at(float{}, pool_scores),
            at(int32_t{}, beam), capacity};
  }
  template <typename At>
  DraftLevel level(const At& at, int number) {
    DraftLevel level;
    level.level = number;
    level.rows = number == 1 ? 1 : topk;
    level.topk = topk;
    level.first = number == 1 ? 0 : pool_capacity(number - 1, topk);
    level.logprobs = at(float{}, logprobs);
    level.tokens = at(int32_t{}, candidate_tokens);
    level.committed = at(int32_t{}, root) + 1;
    level.row_tokens = at(int32_t{}, row_tokens);
    level.row_sources = at(int32_t{}, row_sources);
    level.row_positions = at(int32_t{}, row_positions);
    level.row_slots = at(int32_t{}, row_slots);
    level.row_prefix = at(int32_t{}, row_prefix);
    level.ancestors = at(uint64_t{}, ancestors);
    level.ancestor_words = words;
    return level;
  }
  template <typename At>
  DraftTree tree(const At& at) {
    return {at(int32_t{}, tokens),
            at(int32_t{}, parents),
            at(int32_t{}, positions),
            at(int32_t{}, slots),
            at(int32_t{}, prefix),
            at(int32_t{}, base),
            at(uint64_t{}, tree_ancestors),
            at(int32_t{}, selected),
            tree_words,
            nodes};
  }
  template <typename At>
  TreeRoot tree_root(const At& at) {
    return {at(int32_t{}, root), at(int32_t{}, root) + 1};
  }
  template <typename At>
  TreeWalk tree_walk(const At& at) {
    int32_t* first = at(int32_t{}, walk);
    return {first, first + 1, first + 1 + depth + 1, tree_root(at)};
  }

  int depth, topk, nodes;
  int64_t words, tree_words, capacity;
  Mirror memory;
  size_t pool_tokens, pool_parents, pool_scores, beam, row_tokens, row_sources, row_positions,
      row_slots, row_prefix, ancestors, logprobs, candidate_tokens, tokens, parents, positions,
      slots, prefix, selected, chosen, base, tree_ancestors, root, walk;
};

void check_draft(int depth, int topk, int nodes, bool ties) {
  CAPTURE(depth);
  CAPTURE(topk);
  CAPTURE(nodes);
  CAPTURE(ties);
  const auto cpu = cpu::make_cpu_backend(1);
  Stream stream;
  Random random(static_cast<uint32_t>(depth * 100 + topk));
  Draft d(depth, topk, nodes);
  const auto host = [&](auto type, size_t field) { return d.memory.host<decltype(type)>(field); };
  const auto device = [&](auto type, size_t field) {
    return d.memory.device<decltype(type)>(field);
  };
  host(int32_t{}, d.root)[0] = 99;
  host(int32_t{}, d.root)[1] = 1234;
  d.memory.upload();
  for (int number = 1; number <= depth; ++number) {
    const int rows = number == 1 ? 1 : topk;
    for (int r = 0; r < rows; ++r) {
      std::vector<float> row;
      for (int j = 0; j < topk; ++j) {
        row.push_back(ties ? -0.5f * static_cast<float>(random.below(3))
                           : -static_cast<float>(random.uniform() * 5));
      }
      std::sort(row.begin(), row.end(), std::greater<>());
      if (random.below(12) == 0) row.assign(row.size(), std::nanf(""));
      for (int j = 0; j < topk; ++j) {
        host(float{}, d.logprobs)[r * topk + j] = row[static_cast<size_t>(j)];
        host(int32_t{}, d.candidate_tokens)[r * topk + j] =
            j * 7 + static_cast<int32_t>(random.below(7));
      }
    }
    d.memory.upload();  // the device begins each step with what the CPU made of the last
    cpu->expand_beam(d.pool(host), d.level(host, number));
    expand_beam(d.pool(device), d.level(device, number), stream);
    CAPTURE(number);
    CHECK(d.memory.same(stream));
  }
  cpu->build_tree(d.tree(host), d.pool(host), d.tree_root(host));
  build_tree(d.tree(device), d.pool(device), d.tree_root(device), stream);
  CHECK(d.memory.same(stream));

  for (int round = 0; round < 8; ++round) {
    for (int i = 0; i < nodes; ++i) {
      int32_t token = static_cast<int32_t>(random.below(7 * topk));
      for (int j = i + 1; j < nodes; ++j) {  // mostly a token of some child
        if (host(int32_t{}, d.parents)[j] == i && random.below(2) == 0) {
          token = host(int32_t{}, d.tokens)[j];
        }
      }
      host(int32_t{}, d.chosen)[i] = token;
    }
    d.memory.upload();
    cpu->walk_tree(d.tree_walk(host), d.tree(host), host(int32_t{}, d.chosen));
    walk_tree(d.tree_walk(device), d.tree(device), device(int32_t{}, d.chosen), stream);
    CHECK(d.memory.same(stream));
  }
}

}  // namespace

TEST_CASE("growing, building and walking a tree equal the CPU's") {
  for (const bool ties : {false, true}) {
    check_draft(1, 1, 1, ties);
    check_draft(1, 1, 2, ties);
    check_draft(1, 8, 5, ties);
    check_draft(4, 1, 5, ties);
    check_draft(3, 4, 13, ties);
    check_draft(6, 10, 60, ties);
    check_draft(6, 10, 63, ties);
    check_draft(5, 16, 65, ties);
    check_draft(6, 10, 256, ties);
  }
  for (const bool ties : {false, true}) check_draft(3, 64, 256, ties);  // 4,096 candidates
}

TEST_CASE("a tree of fixed shape equals the CPU's") {
  const auto cpu = cpu::make_cpu_backend(1);
  Stream stream;
  Random random(3);
  for (const int nodes : {1, 2, 60, 63, 64, 65, 256}) {
    CAPTURE(nodes);
    Draft d(4, 10, nodes);
    const auto host = [&](auto type, size_t field) { return d.memory.host<decltype(type)>(field); };
    const auto device = [&](auto type, size_t field) {
      return d.memory.device<decltype(type)>(field);
    };
    // The draft's scratch arrays hold the shape and the candidates.
    const auto shape = [&](const auto& at) {
      return StaticTree{at(int32_t{}, d.selected), at(int32_t{}, d.chosen)};
    };
    host(int32_t{}, d.root)[0] = 5;
    host(int32_t{}, d.root)[1] = 170;
    host(int32_t{}, d.selected)[0] = -1;
    for (int32_t i = 0; i < nodes; ++i) {
      if (i > 0) host(int32_t{}, d.selected)[i] = static_cast<int32_t>(random.below(i));
      host(int32_t{}, d.chosen)[i] = static_cast<int32_t>(random.below(40));
    }
    for (int32_t i = 0; i < 40; ++i) host(int32_t{}, d.pool_tokens)[i] = 1000 + i;
    d.memory.upload();
    cpu->build_static_tree(d.tree(host), shape(host), host(int32_t{}, d.pool_tokens),
                           d.tree_root(host));
    build_static_tree(d.tree(device), shape(device), device(int32_t{}, d.pool_tokens),
                      d.tree_root(device), stream);
    CHECK(d.memory.same(stream));
    CHECK(host(int32_t{}, d.tokens)[0] == 5);
  }
}

TEST_CASE("a planted tree equals the CPU's") {
  const auto cpu = cpu::make_cpu_backend(1);
  Stream stream;
  Random random(8);
  for (const auto& [depth, nodes] :
       {std::pair{1, 2}, {3, 4}, {6, 60}, {2, 60}, {5, 65}, {6, 256}, {4, 3}}) {
    for (const float acceptance : {0.0f, 0.6f, 1.0f}) {
      CAPTURE(depth);
      CAPTURE(nodes);
      CAPTURE(acceptance);
      Draft d(depth, 10, nodes);
      const size_t recorded = d.memory.take<int32_t>(400);
      const size_t plant = d.memory.take<Plant>(1);
      const auto host = [&](auto type, size_t field) {
        return d.memory.host<decltype(type)>(field);
      };
      const auto device = [&](auto type, size_t field) {
        return d.memory.device<decltype(type)>(field);
      };
      for (int32_t i = 0; i < 400; ++i) {
        host(int32_t{}, recorded)[i] = static_cast<int32_t>(random.below(40));
      }
      // A tree of a random shape; near the recording's end in every second case.
      host(int32_t{}, d.base)[0] = nodes % 2 == 0 ? 396 : 100;
      host(int32_t{}, d.parents)[0] = -1;
      for (int32_t i = 0; i < nodes; ++i) {
        if (i > 0) host(int32_t{}, d.parents)[i] = static_cast<int32_t>(random.below(i));
        host(int32_t{}, d.tokens)[i] = static_cast<int32_t>(random.below(40));
      }
      const auto planted = [&](const auto& at) {
        return Plant{at(int32_t{}, recorded), 400, depth, acceptance, 40};
      };
      *host(Plant{}, plant) = planted(device);
      d.memory.upload();
      const Plant of_host = planted(host);
      cpu->plant_tree(d.tree(host), &of_host);
      plant_tree(d.tree(device), device(Plant{}, plant), stream);
      CHECK(d.memory.same(stream));
    }
  }
}

TEST_CASE("an empty pool gives the root alone") {
  Stream stream;
  Draft d(1, 1, 1);
  const auto host = [&](auto type, size_t field) { return d.memory.host<decltype(type)>(field); };
  const auto device = [&](auto type, size_t field) {
    return d.memory.device<decltype(type)>(field);
  };
  host(int32_t{}, d.root)[0] = 5;
  host(int32_t{}, d.root)[1] = 17;
  d.memory.upload();
  cpu::make_cpu_backend(1)->build_tree(d.tree(host), {}, d.tree_root(host));
  build_tree(d.tree(device), {}, d.tree_root(device), stream);
  CHECK(d.memory.same(stream));
}

TEST_CASE("trees that cannot be are refused") {
  Stream stream;
  DraftTree tree;
  tree.nodes = kMaxTreeNodes + 1;
  CHECK_THROWS_AS(build_tree(tree, {}, {}, stream), Error);
  CHECK_THROWS_AS(build_static_tree(tree, {}, nullptr, {}, stream), Error);
  tree.nodes = 3;
  CHECK_THROWS_AS(build_tree(tree, {}, {}, stream), Error);  // from no candidates
  DraftLevel level;
  level.topk = kMaxTreeTopK + 1;
  CHECK_THROWS_AS(expand_beam({}, level, stream), Error);
}

}  // namespace frspec::cuda
