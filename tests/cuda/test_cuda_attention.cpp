// Attention against double-precision loops, and its independence of slots, rows and trees.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "attention_reference.h"
#include "cuda_test_support.h"

namespace frspec::cuda {
namespace {

using Shape = test::AttentionShape;
using View = test::AttentionView;

constexpr Shape kShapes[] = {{4, 2, 64},  {9, 3, 64},  {7, 1, 80}, {4, 4, 96},
                             {8, 2, 128}, {2, 1, 256}, {3, 3, 24}};

// Keys and values [heads, slots, head_dim]; slots that were not written hold NaN.
class Cache {
 public:
  Cache(DType dtype, const Shape& shape, int64_t written, int64_t slots, Random& random)
      : shape_(shape),
        slots_(slots),
        keys_(dtype, shape.heads * slots, shape.head_dim),
        values_(dtype, shape.heads * slots, shape.head_dim) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      for (int64_t slot = 0; slot < slots; ++slot) {
        for (int64_t d = 0; d < shape.head_dim; ++d) {
          key(h, slot)[d] = slot < written ? random.normal() : NAN;
          value(h, slot)[d] = slot < written ? random.normal() : NAN;
        }
      }
    }
    upload();
  }
  float* key(int64_t head, int64_t slot) { return keys_.row(head * slots_ + slot); }
  float* value(int64_t head, int64_t slot) { return values_.row(head * slots_ + slot); }
  void copy_slot(int64_t from, int64_t to) {
    for (int64_t h = 0; h < shape_.heads; ++h) {
      std::copy_n(key(h, from), shape_.head_dim, key(h, to));
      std::copy_n(value(h, from), shape_.head_dim, value(h, to));
    }
  }
  // Values so large that one of them shows where a weight of zero is not nothing.
  void enlarge_some_values() {
    for (int64_t h = 0; h < shape_.heads; ++h) {
      for (int64_t slot = 0; slot < slots_; slot += 7) {
        for (int64_t d = 0; d < shape_.head_dim; ++d) value(h, slot)[d] *= 1000.0f;
      }
    }
    upload();
  }
  void upload() {
    keys_.upload();
    values_.upload();
  }
  KvLayer layer() const {
    return {keys_.tensor().data, values_.tensor().data, keys_.dtype(), shape_.heads, slots_,
            shape_.head_dim};
  }

 private:
  Shape shape_;
  int64_t slots_;
  DeviceMatrix keys_, values_;
};

// As if few queries were worth a division of the keys among warps, as far as this device has the
// shared memory, and as if they were not.
AttentionDevice dividing_keys() {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "asking");
  return {1 << 20, static_cast<size_t>(bytes)};
}
AttentionDevice dividing_queries() { return {0, 0}; }

// Runs attention for rows first ... first + n - 1 of q; fills `out` with what came back.
void run_attention(DeviceMatrix& out, const Tensor& q, const Cache& cache, const View& view,
                   const Shape& shape, cudaStream_t stream,
                   const AttentionDevice& device = dividing_keys()) {
  const DeviceArray<int32_t> prefix(view.prefix);
  const DeviceArray<uint64_t> ancestors(view.ancestors);
  const DeviceArray<int32_t> base(std::vector<int32_t>{view.tree_base});
  // What is launched for a longer sequence serves this one.
  const Visible visible{prefix.data(), base.data(), ancestors.data(), view.words,
                        view.longest + 300};
  const auto rows =
      static_cast<size_t>(attention_parts(visible.max_length) * q.rows * shape.query_heads);
  const DeviceArray<float> values(rows * static_cast<size_t>(padded_head_dim(shape.head_dim)));
  const DeviceArray<float2> sums(rows);
  attention(out.tensor(), q, cache.layer(), visible, view.words == 0,
            {values.data(), sums.data(), rows}, device, stream);
  out.download(stream);
}

double worst_error(const DeviceMatrix& out, const DeviceMatrix& q, Cache& cache, const View& view,
                   const Shape& shape) {
  double worst = 0;
  test::attention_reference(q, cache, view, shape,
                            [&](int64_t row, int64_t column, double want, double magnitude) {
                              // Weights and the result are rounded to the element type.
                              const double allowed = 2 * epsilon(q.dtype()) * magnitude + 1e-5;
                              const double error = std::fabs(want - out.row(row)[column]) / allowed;
                              test::keep_worst(worst, error);
                            });
  return worst;
}

}  // namespace

TEST_CASE("attention of prompt rows equals the double-precision formula") {
  for (const DType dtype : kElementTypes) {
    for (const Shape& shape : kShapes) {
      for (const auto& [before, n] : {std::pair{0, 1}, {0, 70}, {61, 5}, {255, 2}, {300, 17}}) {
        CAPTURE(shape.head_dim);
        CAPTURE(before);
        Stream stream;
        Random random(static_cast<uint32_t>(n + before));
        Cache cache(dtype, shape, before + n, before + n + 40, random);
        const DeviceMatrix q(dtype, n, shape.query_heads * shape.head_dim, random, 1.5f, 8);
        DeviceMatrix out(dtype, n, q.cols());
        View view;
        for (int32_t r = 0; r < n; ++r) view.add(before + r + 1, {});
        run_attention(out, q.tensor(), cache, view, shape, stream);
        CHECK(worst_error(out, q, cache, view, shape) <= 1.0);
      }
    }
  }
}

TEST_CASE("attention over trees of any size equals the double-precision formula") {
  for (const DType dtype : kElementTypes) {
    for (const Shape& shape : kShapes) {
      for (const auto& [base, nodes] :
           {std::pair{0, 1}, {1, 6}, {31, 3}, {96, 59}, {297, 2}, {250, 65}, {330, 100}}) {
        CAPTURE(shape.head_dim);
        CAPTURE(base);
        CAPTURE(nodes);
        if (nodes > 60 && shape.head_dim != 64) continue;
        Stream stream;
        Random random(static_cast<uint32_t>(nodes * 7 + base));
        Cache cache(dtype, shape, base + nodes, base + nodes + 40, random);
        const DeviceMatrix q(dtype, nodes, shape.query_heads * shape.head_dim, random, 1.5f);
        DeviceMatrix out(dtype, nodes, q.cols());
        View view;
        view.words = (nodes + 63) / 64;
        view.tree_base = base;
        for (const auto& path : test::random_paths(nodes, random, kMaxTreeDepth))
          view.add(base, path);
        // That the other division has the same bits is the next test's.
        run_attention(out, q.tensor(), cache, view, shape, stream,
                      nodes % 2 == 0 ? dividing_keys() : dividing_queries());
        CHECK(worst_error(out, q, cache, view, shape) <= 1.0);
      }
    }
  }
}

TEST_CASE("more query heads than a tile has, and more ranges than a warp has lanes") {
  for (const auto& [shape, before] : {std::pair{Shape{20, 1, 64}, 300}, {Shape{2, 1, 64}, 8300}}) {
    constexpr int64_t kNodes = 3;
    const DType dtype = DType::kBF16;
    CAPTURE(before);
    Stream stream;
    Random random(5);
    Cache cache(dtype, shape, before + kNodes, before + kNodes, random);
    const DeviceMatrix q(dtype, kNodes, shape.query_heads * shape.head_dim, random, 1.5f);
    View view;
    view.words = 1;
    view.tree_base = before;
    for (const auto& path : {std::vector{0}, {0, 1}, {0, 2}}) view.add(before, path);
    for (const AttentionDevice& device : {dividing_keys(), dividing_queries()}) {
      DeviceMatrix out(dtype, kNodes, q.cols());
      run_attention(out, q.tensor(), cache, view, shape, stream, device);
      CHECK(worst_error(out, q, cache, view, shape) <= 1.0);
    }
  }
}

TEST_CASE("a row of attention has the same bits alone and among others") {
  for (const auto& [shape, dtype] : {std::pair{kShapes[0], DType::kBF16},
                                     {kShapes[0], DType::kF16},
                                     {kShapes[2], DType::kF16},
                                     {kShapes[5], DType::kBF16}}) {
    CAPTURE(shape.head_dim);
    CAPTURE(dtype);
    // Some rows end before 608, a multiple of the keys that are multiplied at once, most behind it.
    constexpr int32_t kBase = 605;
    constexpr int64_t kNodes = 60;
    Stream stream;
    Random random(17);
    Cache cache(dtype, shape, kBase + kNodes, kBase + kNodes, random);
    cache.enlarge_some_values();
    const DeviceMatrix q(dtype, kNodes, shape.query_heads * shape.head_dim, random, 1.5f);
    const auto paths = test::random_paths(kNodes, random, kMaxTreeDepth);
    const auto rows_of = [&](int64_t first, int64_t n) {
      View view;
      view.words = 1;
      view.tree_base = kBase;
      for (int64_t r = first; r < first + n; ++r) view.add(kBase, paths[static_cast<size_t>(r)]);
      return view;
    };
    DeviceMatrix all(dtype, kNodes, q.cols());
    run_attention(all, q.tensor(), cache, rows_of(0, kNodes), shape, stream);
    for (const auto& [first, n] : {std::pair{0, 1}, {59, 1}, {3, 2}, {20, 17}, {0, 33}}) {
      DeviceMatrix some(dtype, n, q.cols());
      run_attention(some, q.tensor().row_slice(first, n), cache, rows_of(first, n), shape, stream,
                    n % 2 == 0 ? dividing_keys() : dividing_queries());
      for (int64_t r = 0; r < n; ++r) {
        CAPTURE(first);
        CAPTURE(r);
        CHECK(equal_bits(some.row(r), all.row(first + r), q.cols()));
      }
    }
  }
}

TEST_CASE("attention has the same bits whether ancestors are committed or still in the tree") {
  for (const Shape& shape : {kShapes[0], kShapes[4], kShapes[5], kShapes[6]}) {
    CAPTURE(shape.head_dim);
    // Around the places where tiles and ranges end: a row's own positions cross them.
    for (const int32_t base : {0, 30, 62, 94, 96, 126, 250, 280, 288}) {
      CAPTURE(base);
      constexpr int64_t kNodes = 40;
      const DType dtype = kElementTypes[base % 4 == 0];
      Stream stream;
      Random random(static_cast<uint32_t>(base));
      Cache cache(dtype, shape, base + kNodes, base + kNodes, random);
      cache.enlarge_some_values();
      const DeviceMatrix q(dtype, kNodes, shape.query_heads * shape.head_dim, random, 1.5f);
      // A chain in every other slot, as long as a draft may be, so that it crosses boundaries.
      std::vector<std::vector<int32_t>> paths;
      for (int32_t i = 0; i < kNodes; ++i) {
        std::vector<int32_t> path;
        if (i > 1) path = paths[static_cast<size_t>(i - 2)];
        if (i == 1) path = {0};
        path.push_back(i);
        paths.push_back(path);
      }
      View view;
      view.words = 1;
      view.tree_base = base;
      for (const auto& path : paths) view.add(base, path);
      DeviceMatrix in_tree(dtype, kNodes, q.cols());
      run_attention(in_tree, q.tensor(), cache, view, shape, stream);

      for (const size_t node : {size_t{7}, size_t{22}, size_t{39}}) {
        const std::vector<int32_t>& path = paths[node];
        for (size_t j = 0; j < path.size(); ++j) {
          cache.copy_slot(base + path[j], base + static_cast<int32_t>(j));
        }
        cache.upload();
        // All but the node itself committed: it is the root of a new tree.
        const auto committed = static_cast<int32_t>(path.size()) - 1;
        View flat;
        flat.words = 1;
        flat.tree_base = base + committed;
        flat.add(base + committed, {0});
        DeviceMatrix out(dtype, 1, q.cols());
        run_attention(out, q.tensor().row_slice(static_cast<int64_t>(node), 1), cache, flat, shape,
                      stream);
        CAPTURE(node);
        CHECK(equal_bits(out.row(0), in_tree.row(static_cast<int64_t>(node)), q.cols()));
        // As it was, for the next node.
        Random again(static_cast<uint32_t>(base));
        Cache fresh(dtype, shape, base + kNodes, base + kNodes, again);
        fresh.enlarge_some_values();
        for (int64_t slot = 0; slot < base + kNodes; ++slot) {
          for (int64_t h = 0; h < shape.heads; ++h) {
            std::copy_n(fresh.key(h, slot), shape.head_dim, cache.key(h, slot));
            std::copy_n(fresh.value(h, slot), shape.head_dim, cache.value(h, slot));
          }
        }
        cache.upload();
      }
    }
  }
}

TEST_CASE("attention sees what RoPE in front of it appends, whether it is waited for or not") {
  constexpr DType kType = DType::kBF16;
  // Rows of a sequence, few enough that their ranges are there before, and more; a tree.
  for (const auto& [of_shape, before, n, is_tree] : {std::tuple{0, 300, 20, false},
                                                     {0, 90, 33, false},
                                                     {3, 10, 80, false},
                                                     {3, 63, 34, false},
                                                     {0, 300, 60, true}}) {
    const Shape& shape = kShapes[of_shape];
    CAPTURE(before);
    CAPTURE(n);
    Stream stream;
    Random random(static_cast<uint32_t>(n));
    View view;
    view.words = is_tree ? 1 : 0;
    view.tree_base = before;
    std::vector<int32_t> positions;
    std::vector<int32_t> slots;
    for (int32_t r = 0; r < n; ++r) {
      std::vector<int32_t> path{r};
      while (path.front() > 0) path.insert(path.begin(), (path.front() - 1) / 2);
      positions.push_back(before + (is_tree ? static_cast<int32_t>(path.size()) - 1 : r));
      slots.push_back(before + r);
      is_tree ? view.add(before, path) : view.add(before + r + 1, {});
    }
    const DeviceMatrix rope(DType::kF32, before + n, shape.head_dim, random);
    const DeviceArray<int32_t> at(positions);
    const DeviceArray<int32_t> to(slots);
    const DeviceArray<int32_t> prefix(view.prefix);
    const DeviceArray<uint64_t> ancestors(view.ancestors);
    const DeviceArray<int32_t> base(std::vector<int32_t>{view.tree_base});
    const Visible visible{prefix.data(), base.data(), ancestors.data(), view.words, view.longest};
    const auto rows = static_cast<size_t>(attention_parts(view.longest) * n * shape.query_heads);
    const DeviceArray<float> values(rows * static_cast<size_t>(shape.head_dim));
    const DeviceArray<float2> sums(rows);
    const auto run = [&](DeviceMatrix& out, const AttentionDevice& device, bool waits) {
      Random again(7);
      Cache cache(kType, shape, before, before + n, again);
      const DeviceMatrix qkv(kType, n, (shape.query_heads + 2 * shape.heads) * shape.head_dim,
                             again);
      Tensor q = qkv.tensor();
      q.cols = shape.query_heads * shape.head_dim;
      rope_and_append(qkv.tensor(), cache.layer(), rope.tensor(), at.data(), to.data(), nullptr,
                      stream);
      if (waits) check(cudaStreamSynchronize(stream), "test");
      attention(out.tensor(), q, cache.layer(), visible, false, {values.data(), sums.data(), rows},
                device, stream);
      out.download(stream);
    };
    for (const AttentionDevice& device : {dividing_keys(), dividing_queries()}) {
      DeviceMatrix waited(kType, n, shape.query_heads * shape.head_dim);
      DeviceMatrix at_once(kType, n, waited.cols());
      run(waited, device, true);
      run(at_once, device, false);
      for (int64_t r = 0; r < n; ++r) {
        CHECK(std::isfinite(waited.row(r)[0]));
        CHECK(equal_bits(at_once.row(r), waited.row(r), waited.cols()));
      }
    }
  }
}

TEST_CASE("attention refuses what does not fit") {
  Stream stream;
  Random random(1);
  const Shape shape{2, 2, 64};
  Cache cache(DType::kBF16, shape, 8, 8, random);
  const DeviceMatrix q(DType::kBF16, 1, 120, random);
  DeviceMatrix out(DType::kBF16, 1, 120);
  View view;
  view.add(4, {});
  CHECK_THROWS_AS(run_attention(out, q.tensor(), cache, view, shape, stream), Error);
}

}  // namespace frspec::cuda
