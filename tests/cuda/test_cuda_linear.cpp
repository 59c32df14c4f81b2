// Skinny products against double-precision loops, and row invariance.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "cuda_test_support.h"
#ifdef FRSPEC_EMULATE_CUDA
#include "emulation_config.h"
#endif

namespace frspec::cuda {
namespace {

// A weight in device memory with its bias.
class TestWeight {
 public:
  TestWeight(DType dtype, int64_t out, int64_t in, Random& random, bool with_bias)
      : matrix_(dtype, out, in, random, 0.1f), bias_(static_cast<size_t>(out)) {
    std::vector<float> bias(static_cast<size_t>(out));
    for (float& value : bias) value = random.normal();
    bias_.set(bias);
    host_bias_ = with_bias ? bias : std::vector<float>(bias.size(), 0.0f);
    weight_ = {matrix_.tensor().data, dtype, out, in, with_bias ? bias_.data() : nullptr};
  }
  const LinearWeight& weight() const { return weight_; }
  // x . row o + bias[o], and the sum of the magnitudes.
  double dot(const float* x, int64_t o, double* magnitude = nullptr) const {
    double sum = host_bias_[static_cast<size_t>(o)];
    double absolute = std::fabs(sum);
    for (int64_t k = 0; k < matrix_.cols(); ++k) {
      const double product = double{x[k]} * matrix_.row(o)[k];
      sum += product;
      absolute += std::fabs(product);
    }
    if (magnitude != nullptr) *magnitude = absolute;
    return sum;
  }

 private:
  DeviceMatrix matrix_;
  DeviceArray<float> bias_;
  std::vector<float> host_bias_;
  LinearWeight weight_;
};

// Scratch of one product, filled with garbage where that is allowed.
struct Scratch {
  Scratch(int64_t n, int64_t out, bool swiglu, const LinearSplit& split)
      : floats(linear_scratch(n, out, swiglu, split)), sums(floats) {}
  LinearScratch view() const { return {sums.data(), floats}; }
  size_t floats;
  DeviceArray<float> sums;
};

LinearSplit split_in(int parts, int64_t in) {
  const int depth = static_cast<int>((in + parts - 1) / parts);
  return {parts, (depth + 63) / 64 * 64};
}

double silu(double x) { return x / (1 + std::exp(-x)); }

void check_linear(DType dtype, DType out_dtype, int64_t n, int64_t out, int64_t in, int parts,
                  bool bias, bool residual) {
  CAPTURE(dtype_name(dtype));
  CAPTURE(n);
  CAPTURE(out);
  CAPTURE(in);
  CAPTURE(parts);
  Stream stream;
  Random random(static_cast<uint32_t>(n * 7919 + out * 31 + in));
  const DeviceMatrix x(dtype, n, in, random, 1.0f, 8);
  const TestWeight weight(dtype, out, in, random, bias);
  const DeviceMatrix added(dtype, n, out, random);
  DeviceMatrix y(out_dtype, n, out, 3);
  LinearSplit split = split_in(parts, in);
  split.parts = static_cast<int>((in + split.part_depth - 1) / split.part_depth);
  const Scratch scratch(n, out, false, split);
  const Tensor residual_tensor = added.tensor();
  linear(y.tensor(), x.tensor(), weight.weight(), nullptr, residual ? &residual_tensor : nullptr,
         split, scratch.view(), stream);
  y.download(stream);
  double worst = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t o = 0; o < out; ++o) {
      double magnitude = 0;
      double want = weight.dot(x.row(r), o, &magnitude);
      if (residual) want += added.row(r)[o];
      const double allowed = magnitude * 2e-6 + std::fabs(want) * epsilon(out_dtype) + 1e-6;
      test::keep_worst(worst, std::fabs(want - y.row(r)[o]) / allowed);
    }
    for (int64_t o = out; o < out + 3; ++o) CHECK(y.row(r)[o] == 0.0f);
  }
  CHECK(worst <= 1.0);
}

void check_swiglu(DType dtype, int64_t n, int64_t out, int64_t in, int parts, bool bias) {
  CAPTURE(dtype_name(dtype));
  CAPTURE(n);
  CAPTURE(out);
  Stream stream;
  Random random(static_cast<uint32_t>(n + out));
  const DeviceMatrix x(dtype, n, in, random);
  const TestWeight gate(dtype, out, in, random, bias);
  const TestWeight up(dtype, out, in, random, bias);
  DeviceMatrix y(dtype, n, out);
  const LinearSplit split = split_in(parts, in);
  const Scratch scratch(n, out, true, split);
  linear(y.tensor(), x.tensor(), gate.weight(), &up.weight(), nullptr, split, scratch.view(),
         stream);
  y.download(stream);
  double worst = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t o = 0; o < out; ++o) {
      const double want = silu(gate.dot(x.row(r), o)) * up.dot(x.row(r), o);
      const double allowed = std::fabs(want) * (epsilon(dtype) + 1e-4) + 1e-4;
      test::keep_worst(worst, std::fabs(want - y.row(r)[o]) / allowed);
    }
  }
  CHECK(worst <= 1.0);
}

}  // namespace

TEST_CASE("linear equals the double-precision product for ragged shapes") {
  for (const DType dtype : kElementTypes) {
    for (const int64_t n : {1, 7, 8, 9, 16, 17, 32, 33, 60, 64, 65, 100}) {
      check_linear(dtype, dtype, n, 136, 72, 1, n % 2 == 0, n % 3 == 0);
      check_linear(dtype, DType::kF32, n, 33, 200, 1, false, false);
    }
    check_linear(dtype, dtype, 3, 576, 576, 1, true, true);
    check_linear(dtype, dtype, 1, 64, 8, 1, false, false);
    check_linear(dtype, dtype, 40, 700, 1800, 1, false,
                 false);  // more blocks, and stages than places
    check_linear(dtype, DType::kF32, 5, 1, 896, 1, false, false);
    for (const int parts : {2, 3, 4, 8}) {
      check_linear(dtype, dtype, 2, 200, 1032, parts, true, true);
      check_linear(dtype, DType::kF32, 66, 72, 648, parts, false, false);
    }
  }
}

#ifdef FRSPEC_EMULATE_CUDA
// RoPE and attention read early what was written before the product in front of them.
TEST_CASE("a product lets the next kernel start only when it has waited itself") {
  Stream stream;
  Random random(2);
  const auto& early = emulation::statistics().launches_before_wait;
  const DeviceMatrix x(DType::kBF16, 40, 640, random);
  const TestWeight weight(DType::kBF16, 200, 640, random, false);
  DeviceMatrix y(DType::kBF16, 40, 200);
  const Scratch scratch(40, 200, false, split_in(2, 640));
  check(cudaStreamSynchronize(stream), "test");
  uint64_t before = early;
  for (const int64_t n : {1, 16, 40}) {
    for (const int parts : {1, 2}) {
      const Tensor out = y.tensor().row_slice(0, n);
      const Tensor in = x.tensor().row_slice(0, n);
      const LinearSplit split = split_in(parts, 640);
      if (parts == 1) linear(out, in, weight.weight(), nullptr, nullptr, split, {}, stream);
      if (parts == 2)
        linear_parts(out, in, weight.weight(), nullptr, split, scratch.view(), stream);
      check(cudaStreamSynchronize(stream), "test");
      CHECK(early == before);
    }
  }
  const DeviceArray<float> scale(std::vector<float>(640, 1.0f));
  rms_norm(x.tensor(), x.tensor(), scale.data(), 1e-5f, nullptr, stream);
  check(cudaStreamSynchronize(stream), "test");
  CHECK(early > before);  // a small kernel does at once
}
#endif

TEST_CASE("linear may add to the residual in place") {
  Stream stream;
  for (const int parts : {1, 2}) {
    Random random(5);
    const DeviceMatrix x(DType::kBF16, 9, 256, random);
    const TestWeight weight(DType::kBF16, 136, 256, random, false);
    const DeviceMatrix added(DType::kBF16, 9, 136, random);
    DeviceMatrix separate(DType::kBF16, 9, 136);
    DeviceMatrix stream_values(DType::kBF16, 9, 136);
    for (int64_t r = 0; r < 9; ++r) std::copy_n(added.row(r), 136, stream_values.row(r));
    stream_values.upload();
    const LinearSplit split = split_in(parts, 256);
    const Scratch scratch(9, 136, false, split);
    const Tensor residual = added.tensor();
    linear(separate.tensor(), x.tensor(), weight.weight(), nullptr, &residual, split,
           scratch.view(), stream);
    const Tensor in_place = stream_values.tensor();
    linear(in_place, x.tensor(), weight.weight(), nullptr, &in_place, split, scratch.view(),
           stream);
    separate.download(stream);
    stream_values.download(stream);
    for (int64_t r = 0; r < 9; ++r) {
      CHECK(equal_bits(separate.row(r), stream_values.row(r), 136));
    }
  }
}

TEST_CASE("linear_swiglu equals silu(gate) * up in double precision") {
  for (const DType dtype : kElementTypes) {
    for (const auto& [n, out, in, parts] : {std::tuple{1, 72, 136, 1},
                                            {60, 200, 64, 1},
                                            {5, 1536, 72, 1},
                                            {9, 136, 512, 2},
                                            {20, 72, 136, 2},
                                            {70, 64, 1024, 4}}) {
      check_swiglu(dtype, n, out, in, parts, n == 5);
    }
  }
}

TEST_CASE("products that cannot be made are refused") {
  Stream stream;
  Random random(4);
  const DeviceMatrix x(DType::kBF16, 2, 128, random);
  const TestWeight gate(DType::kBF16, 64, 128, random, false);
  DeviceMatrix y(DType::kBF16, 2, 64);
  const auto multiply = [&](const LinearWeight* up, const LinearSplit& split) {
    const Scratch scratch(2, 64, up != nullptr, {4, 64});
    linear(y.tensor(), x.tensor(), gate.weight(), up, nullptr, split, scratch.view(), stream);
  };
  CHECK_THROWS_AS(multiply(nullptr, {2, 32}), Error);   // parts end within a stage
  CHECK_THROWS_AS(multiply(nullptr, {1, 64}), Error);   // parts end before the matrix does
  CHECK_THROWS_AS(multiply(nullptr, {40, 64}), Error);  // more parts than are planned
  LinearWeight narrow = gate.weight();
  narrow.in_features = 64;
  CHECK_THROWS_AS(multiply(&narrow, {1, 128}), Error);
  multiply(&gate.weight(), {1, 128});
}

// fp32 outputs: rounding to 16 bits would hide a changed order of summation.
TEST_CASE("a row of linear has the same bits alone and among others") {
  constexpr int64_t kIn = 712;
  constexpr int64_t kOut = 157;
  for (const DType dtype : kElementTypes) {
    for (const int parts : {1, 3}) {
      Stream stream;
      Random random(11);
      const DeviceMatrix x(dtype, 130, kIn, random);
      const TestWeight weight(dtype, kOut, kIn, random, false);
      const LinearSplit split = split_in(parts, kIn);
      const Scratch scratch(130, kOut, false, split);
      const std::vector<int64_t> chosen{0, 1, 7, 8, 31, 59, 63, 64, 100, 129};
      for (const int64_t r : chosen) {
        DeviceMatrix y(DType::kF32, 1, kOut);
        linear(y.tensor(), x.tensor().row_slice(r, 1), weight.weight(), nullptr, nullptr, split,
               scratch.view(), stream);
        y.download(stream);
        for (const int64_t n : {1, 2, 8, 9, 17, 30, 60, 64, 65, 130}) {
          const int64_t first = std::max<int64_t>(0, std::min(r - n / 3, 130 - n));
          if (r < first || r >= first + n) continue;
          DeviceMatrix many(DType::kF32, n, kOut);
          linear(many.tensor(), x.tensor().row_slice(first, n), weight.weight(), nullptr, nullptr,
                 split, scratch.view(), stream);
          many.download(stream);
          CAPTURE(r);
          CAPTURE(n);
          CHECK(equal_bits(many.row(r - first), y.row(0), kOut));
        }
      }
    }
  }
}

// Short pipelines, as gate and up of a model have them, whose places are used again.
TEST_CASE("products of more blocks than multiprocessors") {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "test");
  constexpr int64_t kIn = 640;
  const int64_t out = (multiprocessors / 2 + 1) * int64_t{128};  // in two parts
  for (const int64_t n : {1, 9, 20, 60}) {
    check_linear(DType::kBF16, DType::kF32, n, out, kIn, 2, true, false);
    check_swiglu(DType::kBF16, n, (multiprocessors + 1) * int64_t{64}, kIn, 1, true);
  }

  Stream stream;
  Random random(12);
  const DeviceMatrix x(DType::kBF16, 60, kIn, random);
  const TestWeight weight(DType::kBF16, out, kIn, random, false);
  const LinearSplit split = split_in(2, kIn);
  const Scratch scratch(60, out, false, split);
  DeviceMatrix many(DType::kF32, 60, out);
  linear(many.tensor(), x.tensor(), weight.weight(), nullptr, nullptr, split, scratch.view(),
         stream);
  many.download(stream);
  for (const int64_t r : {0, 8, 59}) {
    DeviceMatrix alone(DType::kF32, 1, out);
    linear(alone.tensor(), x.tensor().row_slice(r, 1), weight.weight(), nullptr, nullptr, split,
           scratch.view(), stream);
    alone.download(stream);
    CAPTURE(r);
    CHECK(equal_bits(many.row(r), alone.row(0), out));
  }
}

TEST_CASE("norm and RoPE make the same of a product's parts as of the product") {
  constexpr int64_t kSlots = 80;
  for (const DType dtype : kElementTypes) {
    for (const auto& [n, out, in, parts, kv_heads, head_dim] :
         {std::tuple{1, 512, 256, 2, 2, 64},
          {9, 512, 1032, 3, 1, 128},
          {60, 640, 640, 4, 2, 80},
          {66, 512, 648, 8, 2, 64},
          {2, 8448, 128, 2, 0, 0}}) {  // more than a thread holds, and no RoPE
      CAPTURE(n);
      CAPTURE(parts);
      Stream stream;
      Random random(static_cast<uint32_t>(n + parts));
      const DeviceMatrix x(dtype, n, in, random);
      const TestWeight weight(dtype, out, in, random, parts != 3);
      const DeviceMatrix added(dtype, n, out, random);
      const Tensor residual = added.tensor();
      std::vector<float> scales(static_cast<size_t>(out));
      for (float& scale : scales) scale = random.normal();
      const DeviceArray<float> scale(scales);
      LinearSplit split = split_in(parts, in);
      split.parts = static_cast<int>((in + split.part_depth - 1) / split.part_depth);
      REQUIRE(split.parts > 1);
      const Scratch scratch(n, out, false, split);

      DeviceMatrix whole(dtype, n, out);
      DeviceMatrix normed(dtype, n, out);
      linear(whole.tensor(), x.tensor(), weight.weight(), nullptr, &residual, split, scratch.view(),
             stream);
      rms_norm(normed.tensor(), whole.tensor(), scale.data(), 1e-5f, nullptr, stream);
      DeviceMatrix made(dtype, n, out);
      DeviceMatrix made_normed(dtype, n, out);
      LinearParts of_product = linear_parts(made.tensor(), x.tensor(), weight.weight(), &residual,
                                            split, scratch.view(), stream);
      rms_norm(made_normed.tensor(), made.tensor(), scale.data(), 1e-5f, &of_product, stream);
      DeviceMatrix summed(dtype, n, out);
      add_parts(summed.tensor(), of_product, stream);
      for (DeviceMatrix* each : {&whole, &normed, &made, &made_normed, &summed}) {
        each->download(stream);
      }
      for (int64_t r = 0; r < n; ++r) {
        CHECK(equal_bits(made.row(r), whole.row(r), out));
        CHECK(equal_bits(made_normed.row(r), normed.row(r), out));
        CHECK(equal_bits(summed.row(r), whole.row(r), out));
      }
      if (head_dim == 0) continue;

      DeviceMatrix rope(DType::kF32, kSlots, head_dim, random);
      std::vector<int32_t> rows(static_cast<size_t>(n));
      std::iota(rows.begin(), rows.end(), 3);
      const DeviceArray<int32_t> positions(rows);
      linear(whole.tensor(), x.tensor(), weight.weight(), nullptr, nullptr, split, scratch.view(),
             stream);
      of_product = linear_parts(made.tensor(), x.tensor(), weight.weight(), nullptr, split,
                                scratch.view(), stream);
      DeviceMatrix caches[2][2] = {
          {{dtype, kv_heads * kSlots, head_dim}, {dtype, kv_heads * kSlots, head_dim}},
          {{dtype, kv_heads * kSlots, head_dim}, {dtype, kv_heads * kSlots, head_dim}}};
      const auto append = [&](DeviceMatrix& qkv, DeviceMatrix(&cache)[2],
                              const LinearParts* of_qkv) {
        const KvLayer layer{
            cache[0].tensor().data, cache[1].tensor().data, dtype, kv_heads, kSlots, head_dim};
        rope_and_append(qkv.tensor(), layer, rope.tensor(), positions.data(), positions.data(),
                        of_qkv, stream);
        for (DeviceMatrix* each : {&qkv, &cache[0], &cache[1]}) each->download(stream);
      };
      append(whole, caches[0], nullptr);
      append(made, caches[1], &of_product);
      for (int64_t r = 0; r < n; ++r) {
        CHECK(equal_bits(made.row(r), whole.row(r), out - 2 * kv_heads * head_dim));
      }
      for (const int which : {0, 1}) {
        for (int64_t r = 0; r < kv_heads * kSlots; ++r) {
          CHECK(equal_bits(caches[1][which].row(r), caches[0][which].row(r), head_dim));
        }
      }
    }
  }
}

TEST_CASE("the split of a matrix covers its depth and depends on its shape alone") {
  for (const auto& [out, in] : {std::pair{4096, 4096},
                                {6144, 4096},
                                {14336, 4096},
                                {4096, 14336},
                                {128256, 4096},
                                {576, 1536},
                                {960, 576},
                                {8, 8}}) {
    for (const int multiprocessors : {4, 108, 132, 148}) {
      for (const bool swiglu : {false, true}) {
        const LinearSplit split = split_linear(out, in, swiglu, multiprocessors);
        CHECK(split.part_depth % 64 == 0);
        CHECK(split.parts * split.part_depth >= in);
        CHECK((split.parts - 1) * split.part_depth < in);
        for (const int64_t n : {1, 60, 256}) {
          CHECK(linear_scratch(n, out, swiglu, split) <= most_linear_scratch(n, multiprocessors));
        }
      }
    }
  }
}

TEST_CASE("linear refuses what does not fit") {
  Stream stream;
  Random random(1);
  const TestWeight weight(DType::kBF16, 64, 64, random, false);
  const LinearSplit split{1, 64};
  const Scratch scratch(2, 64, false, split);
  const DeviceMatrix narrow(DType::kBF16, 2, 56, random);
  const DeviceMatrix other(DType::kF16, 2, 64, random);
  DeviceMatrix y(DType::kBF16, 2, 64);
  CHECK_THROWS_AS(linear(y.tensor(), narrow.tensor(), weight.weight(), nullptr, nullptr, split,
                         scratch.view(), stream),
                  Error);
  CHECK_THROWS_AS(linear(y.tensor(), other.tensor(), weight.weight(), nullptr, nullptr, split,
                         scratch.view(), stream),
                  Error);
  const DeviceMatrix x(DType::kBF16, 2, 64, random);
  DeviceMatrix wide(DType::kBF16, 2, 72);
  CHECK_THROWS_AS(linear(wide.tensor(), x.tensor(), weight.weight(), nullptr, nullptr, split,
                         scratch.view(), stream),
                  Error);
  const Tensor residual = wide.tensor();
  CHECK_THROWS_WITH_AS(linear(y.tensor(), x.tensor(), weight.weight(), nullptr, &residual, split,
                              scratch.view(), stream),
                       doctest::Contains("the residual's shape differs"), Error);
  CHECK_THROWS_AS(linear(y.tensor(), x.tensor(), weight.weight(), nullptr, nullptr, {2, 64},
                         scratch.view(), stream),
                  Error);
}

}  // namespace frspec::cuda
