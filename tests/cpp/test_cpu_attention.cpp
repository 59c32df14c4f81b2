// Attention against double-precision loops, and its independence of slots, tiles and threads.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "attention_reference.h"
#include "cpu_test_support.h"

namespace frspec::cpu {
namespace {

using Shape = test::AttentionShape;
using View = test::AttentionView;
using test::random_paths;

constexpr Shape kShapes[] = {{2, 2, 8},   {6, 2, 24}, {9, 3, 64},
                             {14, 2, 64}, {4, 4, 80}, {8, 1, 128}};

WorkspaceLimits limits_for(const Shape& shape, int64_t rows, int64_t visible) {
  WorkspaceLimits limits;
  limits.rows = rows;
  limits.visible = visible;
  limits.query_heads = shape.query_heads;
  limits.in_features = shape.query_heads * shape.head_dim;
  return limits;
}

double tolerance(DType dtype) { return dtype == DType::kBF16 ? 2e-2 : 2e-5; }

struct KvBackend {
  const Kernels* kernels;
  DType dtype;
  TestBackend backend;
};

// One for each kind of cache, with two threads.
std::vector<KvBackend> all_backends(const WorkspaceLimits& limits) {
  std::vector<KvBackend> result;
  for (const auto& [kernels, dtype] : all_kv_caches()) {
    result.push_back({kernels, dtype, TestBackend(*kernels, 2, limits)});
  }
  return result;
}

// Outputs have `gap` columns of room behind each row.
void check_attention(const std::vector<KvBackend>& backends, Matrix& q, TestKv& cache,
                     const View& view, const Shape& shape, int64_t gap) {
  std::vector<double> wanted;  // by rows
  test::attention_reference(q, cache, view, shape,
                            [&](int64_t, int64_t, double want, double) { wanted.push_back(want); });
  for (const KvBackend& each : backends) {
    CAPTURE(each.kernels->name);
    CAPTURE(dtype_name(each.dtype));
    Matrix out(q.rows(), q.cols(), gap);
    const KvLayer layer = cache.pack(*each.backend, each.dtype);
    each.backend->attention(out.tensor(), q.tensor(), layer, view.visible());
    double worst = 0;
    const double* want = wanted.data();
    for (int64_t r = 0; r < q.rows(); ++r) {
      for (int64_t c = 0; c < q.cols(); ++c) {
        test::keep_worst(worst, std::fabs(*want++ - out.row(r)[c]));
      }
    }
    CHECK(worst < tolerance(each.dtype));
  }
}

}  // namespace

TEST_CASE("attention over a prefix equals the double-precision formula") {
  for (const Shape& shape : kShapes) {
    CAPTURE(shape.head_dim);
    const std::vector<KvBackend> backends = all_backends(limits_for(shape, 80, 1400));
    for (const int64_t n : {1, 3, 65}) {
      for (const int32_t before : {0, 1, 90, 126, 128, 511, 1300}) {
        if (n > 3 && before > 511) continue;
        CAPTURE(n);
        CAPTURE(before);
        Random random(static_cast<uint32_t>(n + before));
        TestKv cache(shape.heads, before + n + 2, shape.head_dim, random);
        Matrix q(n, shape.query_heads * shape.head_dim, random, 2.0f, 4);
        View view;
        for (int32_t r = 0; r < n; ++r) view.add(before + r + 1, {});
        check_attention(backends, q, cache, view, shape, 1);
      }
    }
  }
}

TEST_CASE("attention over trees of any size equals the double-precision formula") {
  for (const Shape& shape : kShapes) {
    CAPTURE(shape.head_dim);
    const std::vector<KvBackend> backends = all_backends(limits_for(shape, 100, 1000));
    for (const int64_t nodes : {1, 59, 63, 64, 65, 100}) {
      for (const int32_t base : {0, 120, 250}) {
        CAPTURE(nodes);
        CAPTURE(base);
        Random random(static_cast<uint32_t>(nodes * 7 + base));
        TestKv cache(shape.heads, base + nodes, shape.head_dim, random);
        Matrix q(nodes, shape.query_heads * shape.head_dim, random, 2.0f);
        View view;
        view.words = (nodes + 63) / 64;
        view.tree_base = base;
        for (const auto& path : random_paths(nodes, random)) view.add(base, path);
        check_attention(backends, q, cache, view, shape, 0);
      }
    }
  }
}

TEST_CASE("a row of attention has the same bits alone and among others, for every thread count") {
  for (const auto& [kernels, dtype] : all_kv_caches()) {
    CAPTURE(kernels->name);
    CAPTURE(dtype_name(dtype));
    for (const Shape& shape : {kShapes[1], kShapes[2], kShapes[4]}) {
      constexpr int32_t kBase = 1270;
      constexpr int64_t kNodes = 70;
      Random random(17);
      TestKv cache(shape.heads, kBase + kNodes, shape.head_dim, random);
      Matrix q(kNodes, shape.query_heads * shape.head_dim, random, 2.0f);
      const auto paths = random_paths(kNodes, random);
      Matrix alone(kNodes, q.cols());
      for (const int threads : {1, 2, 3}) {
        TestBackend backend(*kernels, threads, limits_for(shape, kNodes, kBase + kNodes));
        const KvLayer layer = cache.pack(*backend, dtype);
        for (const int64_t n : {1, 2, 5, 8, 33, 70}) {
          for (int64_t first = 0; first + n <= kNodes; first += n) {
            View view;
            view.words = 2;
            view.tree_base = kBase;
            for (int64_t r = 0; r < n; ++r) view.add(kBase, paths[static_cast<size_t>(first + r)]);
            Matrix out(n, q.cols());
            backend->attention(out.tensor(), q.tensor().row_slice(first, n), layer, view.visible());
            bool same = true;
            for (int64_t r = 0; r < n; ++r) {
              if (n == 1 && threads == 1) {
                std::copy_n(out.row(0), q.cols(), alone.row(first));
              }
              same = same && equal_bits(out.row(r), alone.row(first + r), q.cols());
            }
            CAPTURE(n);
            CAPTURE(threads);
            CHECK(same);
          }
        }
      }
    }
  }
}

TEST_CASE("attention has the same bits whether ancestors are committed or still in the tree") {
  for (const auto& [kernels, dtype] : all_kv_caches()) {
    CAPTURE(kernels->name);
    CAPTURE(dtype_name(dtype));
    for (const Shape& shape : {kShapes[0], kShapes[3], kShapes[5]}) {
      TestBackend backend(*kernels, 2, limits_for(shape, 80, 1200));
      for (const int32_t base : {0, 30, 122, 125, 508, 1021}) {
        Random random(static_cast<uint32_t>(base));
        constexpr int64_t kNodes = 66;
        TestKv cache(shape.heads, base + kNodes, shape.head_dim, random);
        Matrix q(kNodes, shape.query_heads * shape.head_dim, random, 2.0f);
        const auto paths = random_paths(kNodes, random);
        View view;
        view.words = 2;
        view.tree_base = base;
        for (const auto& path : paths) view.add(base, path);
        Matrix in_tree(kNodes, q.cols());
        backend->attention(in_tree.tensor(), q.tensor(), cache.pack(*backend, dtype),
                           view.visible());

        const size_t node = kNodes - 1;
        const std::vector<int32_t>& path = paths[node];
        // All of the path committed; then all but the node itself, as the root of a new tree.
        for (const size_t committed : {path.size(), path.size() - 1}) {
          TestKv moved = cache;
          for (size_t j = 0; j < path.size(); ++j) {
            moved.copy_slot(base + path[j], base + static_cast<int32_t>(j));
          }
          View flat;
          flat.tree_base = base + static_cast<int32_t>(committed);
          flat.words = committed == path.size() ? 0 : 1;
          if (committed == path.size()) {
            flat.add(base + static_cast<int32_t>(committed), {});
          } else {
            flat.add(base + static_cast<int32_t>(committed), {0});
          }
          Matrix out(1, q.cols());
          backend->attention(out.tensor(), q.tensor().row_slice(static_cast<int64_t>(node), 1),
                             moved.pack(*backend, dtype), flat.visible());
          CAPTURE(base);
          CAPTURE(committed);
          CHECK(equal_bits(out.row(0), in_tree.row(static_cast<int64_t>(node)), q.cols()));
        }
      }
    }
  }
}

TEST_CASE("NaN behind a row's prefix does not reach the row") {
  const Shape shape{4, 2, 16};
  constexpr int32_t kRows = 24;  // of two tiles
  for (const auto& [kernels, dtype] : all_kv_caches()) {
    TestBackend backend(*kernels, 1, limits_for(shape, kRows, 200));
    Random random(2);
    TestKv cache(shape.heads, 160, shape.head_dim, random);
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t d = 0; d < 16; ++d) cache.key(h, 133)[d] = cache.value(h, 133)[d] = NAN;
    }
    Matrix q(kRows, 64, random);
    View view;
    for (int32_t r = 0; r < kRows; ++r) view.add(133 - kRows + 2 + r, {});
    Matrix out(kRows, 64);  // the last row sees slot 133
    backend->attention(out.tensor(), q.tensor(), cache.pack(*backend, dtype), view.visible());
    for (int64_t i = 0; i < 64; ++i) {
      for (int32_t r = 0; r < kRows - 1; ++r) CHECK(std::isfinite(out.row(r)[i]));
      CHECK(std::isnan(out.row(kRows - 1)[i]));
    }
  }
}

TEST_CASE("attention refuses head dimensions that it cannot do") {
  const Shape shape{2, 2, 12};
  TestBackend backend(*kernels_portable(), 1, limits_for(shape, 2, 10));
  Random random(1);
  TestKv cache(shape.heads, 4, shape.head_dim, random);
  Matrix q(1, 24);
  Matrix out(1, 24);
  View view;
  view.add(1, {});
  CHECK_THROWS_AS(backend->attention(out.tensor(), q.tensor(), cache.pack(*backend, DType::kF32),
                                     view.visible()),
                  Error);
}

}  // namespace frspec::cpu
