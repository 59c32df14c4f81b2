// Attention in double precision, and what its rows see.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "backend.h"
#include "random.h"

namespace frspec::test {

struct AttentionShape {
  int64_t query_heads;
  int64_t heads;
  int64_t head_dim;
};

// Which slots a row sees, in order, and the arrays that say so.
struct AttentionView {
  int64_t words = 0;  // of ancestors; set before the first add()
  int32_t tree_base = 0;
  std::vector<int32_t> prefix;
  std::vector<uint64_t> ancestors;
  std::vector<std::vector<int32_t>> slots;
  int64_t longest = 0;

  void add(int32_t prefix_length, const std::vector<int32_t>& bits) {
    prefix.push_back(prefix_length);
    ancestors.resize(ancestors.size() + static_cast<size_t>(words), 0);
    std::vector<int32_t> row(static_cast<size_t>(prefix_length));
    std::iota(row.begin(), row.end(), 0);
    uint64_t* own = ancestors.data() + ancestors.size() - static_cast<size_t>(words);
    for (const int32_t bit : bits) {
      own[bit / 64] |= uint64_t{1} << (bit % 64);
      row.push_back(tree_base + bit);
    }
    longest = std::max(longest, static_cast<int64_t>(row.size()));
    slots.push_back(row);
  }
  Visible visible() const {
    return {prefix.data(), &tree_base, words > 0 ? ancestors.data() : nullptr, words, longest};
  }
};

// A random tree: the path of ancestors of every node, itself included, at most `deepest` below the
// root.
inline std::vector<std::vector<int32_t>> random_paths(int64_t nodes, Random& random,
                                                      size_t deepest = SIZE_MAX) {
  std::vector<std::vector<int32_t>> paths;
  for (int32_t i = 0; i < nodes; ++i) {
    std::vector<int32_t> path;
    if (i > 0) {
      do {
        path = paths[static_cast<size_t>(random.below(i))];
      } while (path.size() > deepest);
    }
    path.push_back(i);
    paths.push_back(path);
  }
  return paths;
}

// check(row, column, want, magnitude) for every element of the output: what the formula gives, and
// the sum of its parts without their signs. q: [n, H D] with row(i); cache: key(head, slot) and
// value(head, slot) of D floats.
template <typename Queries, typename Cache, typename Check>
void attention_reference(const Queries& q, Cache& cache, const AttentionView& view,
                         const AttentionShape& shape, const Check& check) {
  const int64_t head_dim = shape.head_dim;
  for (int64_t r = 0; r < q.rows(); ++r) {
    const std::vector<int32_t>& slots = view.slots[static_cast<size_t>(r)];
    for (int64_t h = 0; h < shape.query_heads; ++h) {
      const int64_t head = h / (shape.query_heads / shape.heads);
      const float* query = q.row(r) + h * head_dim;
      std::vector<double> weight(slots.size());
      double max = -1e300;
      for (size_t t = 0; t < slots.size(); ++t) {
        const float* key = cache.key(head, slots[t]);
        double score = 0;
        for (int64_t d = 0; d < head_dim; ++d) score += double{query[d]} * key[d];
        weight[t] = score / std::sqrt(static_cast<double>(head_dim));
        max = std::max(max, weight[t]);
      }
      double sum = 0;
      for (double& value : weight) sum += value = std::exp(value - max);
      std::vector<double> want(static_cast<size_t>(head_dim));
      std::vector<double> magnitude(static_cast<size_t>(head_dim));
      for (size_t t = 0; t < slots.size(); ++t) {
        const float* value = cache.value(head, slots[t]);
        for (size_t d = 0; d < want.size(); ++d) {
          const double part = weight[t] / sum * value[d];
          want[d] += part;
          magnitude[d] += std::fabs(part);
        }
      }
      for (size_t d = 0; d < want.size(); ++d) {
        check(r, h * head_dim + static_cast<int64_t>(d), want[d], magnitude[d]);
      }
    }
  }
}

}  // namespace frspec::test
