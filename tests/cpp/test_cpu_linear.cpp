// Packed weights and matrix products against double-precision loops, and row invariance.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu_test_support.h"

namespace frspec::cpu {
namespace {

constexpr DType kWeightTypes[] = {DType::kBF16, DType::kF16, DType::kF32};

double dot(const float* a, const float* b, int64_t count, double* magnitude) {
  double sum = 0;
  double absolute = 0;
  for (int64_t k = 0; k < count; ++k) {
    sum += double{a[k]} * b[k];
    absolute += std::fabs(double{a[k]} * b[k]);
  }
  if (magnitude != nullptr) *magnitude = absolute;
  return sum;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

// Rounding errors of a sum grow with the sum of magnitudes.
constexpr double kTolerance = 1e-5;

// The activations that enter a product: rounded to bf16 where the instruction set does so.
Matrix entering(const Kernels& kernels, DType weight_dtype, const Matrix& x) {
  Matrix values = x;
  if (!kernels.rounds_inputs[static_cast<int>(weight_dtype)]) return values;
  std::vector<uint16_t> rounded(static_cast<size_t>(x.cols()));
  for (int64_t r = 0; r < x.rows(); ++r) {
    convert(rounded.data(), DType::kBF16, x.row(r), DType::kF32, x.cols());
    convert(values.row(r), DType::kF32, rounded.data(), DType::kBF16, x.cols());
  }
  return values;
}

void check_linear(Backend& backend, const Kernels& kernels, DType dtype, int64_t n, int64_t in,
                  int64_t out, bool with_bias, bool with_residual) {
  CAPTURE(n);
  CAPTURE(in);
  CAPTURE(out);
  Random random(static_cast<uint32_t>(n * 1000003 + in * 1009 + out));
  Matrix x(n, in, random, 1.0f, 3);
  Matrix w(out, in, random, 0.1f);
  Matrix bias(1, out, random);
  Matrix residual(n, out, random, 1.0f, 2);
  TestWeight weight(backend, dtype, w, with_bias ? bias.row(0) : nullptr);
  Matrix y(n, out, 5);
  const Tensor residual_tensor = residual.tensor();
  backend.linear(y.tensor(), x.tensor(), weight.weight(), Rows::kTarget,
                 with_residual ? &residual_tensor : nullptr);
  const Matrix entered = entering(kernels, dtype, x);
  double worst = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t j = 0; j < out; ++j) {
      double magnitude = 0;
      double want = dot(entered.row(r), weight.values().row(j), in, &magnitude);
      if (with_bias) want += bias.row(0)[j];
      if (with_residual) want += residual.row(r)[j];
      test::keep_worst(worst, std::fabs(want - y.row(r)[j]) / (magnitude + 1));
    }
    for (int64_t j = out; j < out + 5; ++j) CHECK(y.row(r)[j] == 0.0f);
  }
  CHECK(worst < kTolerance);
}

}  // namespace

TEST_CASE("linear equals the double-precision product for ragged shapes") {
  for (const Kernels* kernels : all_kernels()) {
    CAPTURE(kernels->name);
    for (const DType dtype : kWeightTypes) {
      CAPTURE(dtype_name(dtype));
      TestBackend backend(*kernels, 2, product_limits(600, 4864));
      for (const int64_t in : {1, 7, 72, 577, 896}) {
        for (const int64_t out : {1, 15, 17, 72}) {
          check_linear(*backend, *kernels, dtype, 1, in, out, false, false);
          check_linear(*backend, *kernels, dtype, 3, in, out, true, false);
          check_linear(*backend, *kernels, dtype, 13, in, out, true, true);
        }
      }
      for (const int64_t n : {2, 4, 5, 6, 7, 8, 12, 24, 25, 60}) {
        check_linear(*backend, *kernels, dtype, n, 576, 72, n % 2 == 0, n % 3 == 0);
      }
      check_linear(*backend, *kernels, dtype, 4, 1792, 509, true, true);
      check_linear(*backend, *kernels, dtype, 9, 4864, 31, true, true);
      check_linear(*backend, *kernels, dtype, 13, 4864, 33, true, true);  // tiles times blocks of k
      check_linear(*backend, *kernels, dtype, 25, 2101, 33, true, true);
      check_linear(*backend, *kernels, dtype, 400, 300, 50, true, true);
    }
  }
}

TEST_CASE("linear may add to the residual in place") {
  for (const Kernels* kernels : all_kernels()) {
    CAPTURE(kernels->name);
    TestBackend backend(*kernels, 2, product_limits(16, 96));
    Random random(5);
    for (const int64_t n : {1, 9}) {
      Matrix x(n, 96, random);
      Matrix stream(n, 50, random);
      TestWeight weight(*backend, DType::kBF16, Matrix(50, 96, random));
      Matrix separate(n, 50);
      const Tensor residual = stream.tensor();
      backend->linear(separate.tensor(), x.tensor(), weight.weight(), Rows::kTarget, &residual);
      backend->linear(residual, x.tensor(), weight.weight(), Rows::kTarget, &residual);
      for (int64_t r = 0; r < n; ++r) CHECK(equal_bits(separate.row(r), stream.row(r), 50));
    }
  }
}

TEST_CASE("linear_swiglu equals silu(gate) * up in double precision") {
  for (const Kernels* kernels : all_kernels()) {
    CAPTURE(kernels->name);
    for (const DType dtype : kWeightTypes) {
      for (const int64_t n : {1, 2, 7, 33, 64, 200}) {
        const int64_t in = 577;
        TestBackend backend(*kernels, n % 2 == 0 ? 2 : 1, product_limits(n, in));
        for (const int64_t out : {1, 72, n > 64 ? 33 : 157}) {
          Random random(static_cast<uint32_t>(n + out));
          Matrix x(n, in, random);
          TestWeight gate(*backend, dtype, Matrix(out, in, random, 0.1f));
          TestWeight up(*backend, dtype, Matrix(out, in, random, 0.1f));
          Matrix y(n, out);
          backend->linear_swiglu(y.tensor(), x.tensor(), gate.weight(), up.weight());
          const Matrix entered = entering(*kernels, dtype, x);
          double worst = 0;
          for (int64_t r = 0; r < n; ++r) {
            for (int64_t j = 0; j < out; ++j) {
              const double want = silu(dot(entered.row(r), gate.values().row(j), in, nullptr)) *
                                  dot(entered.row(r), up.values().row(j), in, nullptr);
              test::keep_worst(worst, std::fabs(want - y.row(r)[j]) / (1 + std::fabs(want)));
            }
          }
          CHECK(worst < 2e-4);
        }
      }
    }
  }
}

TEST_CASE("a row of linear has the same bits alone and among others, for every thread count") {
  constexpr int64_t kIn = 610;
  constexpr int64_t kOut = 157;
  for (const Kernels* kernels : all_kernels()) {
    CAPTURE(kernels->name);
    for (const DType dtype : kWeightTypes) {
      Random random(11);
      Matrix x(512, kIn, random);
      for (int64_t r = 65; r < 512; ++r) std::copy_n(x.row(r % 65), kIn, x.row(r));
      Matrix w(kOut, kIn, random, 0.1f);
      Matrix v(kOut, kIn, random, 0.1f);
      Matrix alone(65, kOut);
      Matrix alone_swiglu(65, kOut);
      for (const int threads : {1, 2, 3}) {
        TestBackend backend(*kernels, threads, product_limits(512, kIn));
        TestWeight weight(*backend, dtype, w);
        TestWeight other(*backend, dtype, v);
        if (threads == 1) {
          for (int64_t r = 0; r < 65; ++r) {
            backend->linear(alone.tensor().row_slice(r, 1), x.tensor().row_slice(r, 1),
                            weight.weight());
            backend->linear_swiglu(alone_swiglu.tensor().row_slice(r, 1),
                                   x.tensor().row_slice(r, 1), weight.weight(), other.weight());
          }
        }
        for (int64_t n = 1; n <= 65; n += threads == 1 ? 1 : 7) {
          const int64_t first = (65 - n) / 2;  // so that the row's index changes with n
          Matrix y(n, kOut);
          backend->linear(y.tensor(), x.tensor().row_slice(first, n), weight.weight());
          bool same = true;
          for (int64_t r = 0; r < n; ++r) {
            same = same && equal_bits(y.row(r), alone.row(first + r), kOut);
          }
          backend->linear_swiglu(y.tensor(), x.tensor().row_slice(first, n), weight.weight(),
                                 other.weight());
          for (int64_t r = 0; r < n; ++r) {
            same = same && equal_bits(y.row(r), alone_swiglu.row(first + r), kOut);
          }
          CAPTURE(n);
          CHECK(same);
        }
        Matrix y(512, kOut);
        backend->linear(y.tensor(), x.tensor(), weight.weight());
        bool same = true;
        for (int64_t r = 0; r < 512; ++r) {
          same = same && equal_bits(y.row(r), alone.row(r % 65), kOut);
        }
        CHECK(same);
      }
    }
  }
}

TEST_CASE("weights are placed at any row, converted, gathered and embedded exactly") {
  constexpr int64_t kIn = 133;
  for (const Kernels* kernels : all_kernels()) {
    CAPTURE(kernels->name);
    TestBackend backend(*kernels, 2, product_limits(64, kIn));
    for (const DType to : kWeightTypes) {
      for (const DType from : kWeightTypes) {
        Random random(3);
        Matrix values(101, kIn, random);
        // Round to the source type first, then to the weight's.
        std::vector<uint32_t> source(static_cast<size_t>(101 * kIn));
        convert(source.data(), from, values.row(0), DType::kF32, 101 * kIn);
        std::vector<uint32_t> rounded(source.size());
        convert(rounded.data(), to, source.data(), from, 101 * kIn);
        Matrix want(101, kIn);
        convert(want.row(0), DType::kF32, rounded.data(), to, 101 * kIn);

        std::vector<char> memory(backend->linear_bytes(to, 101, kIn), 0);
        LinearWeight weight{memory.data(), to, 101, kIn, nullptr};
        const Tensor all{source.data(), from, 101, kIn, kIn};
        for (const auto& [first, count] : {std::pair{40, 61}, {0, 5}, {5, 35}}) {
          backend->load_linear(weight, first, all.row_slice(first, count));
        }
        std::vector<int32_t> rows(101);
        for (int32_t i = 0; i < 101; ++i) rows[static_cast<size_t>(i)] = 100 - i;
        Matrix embedded(101, kIn);
        backend->embed(embedded.tensor(), weight, rows.data());
        bool same = true;
        for (int64_t i = 0; i < 101; ++i) {
          same = same && equal_bits(embedded.row(i), want.row(100 - i), kIn);
        }
        CHECK(same);

        std::vector<int32_t> subset;
        for (int32_t i = 0; i < 37; ++i) subset.push_back((i * 29 + 3) % 101);
        std::vector<char> subset_memory(backend->linear_bytes(to, 37, kIn), 0);
        LinearWeight gathered{subset_memory.data(), to, 37, kIn, nullptr};
        backend->gather_linear(gathered, weight, subset.data());
        std::vector<int32_t> identity(37);
        for (int32_t i = 0; i < 37; ++i) identity[static_cast<size_t>(i)] = i;
        Matrix out(37, kIn);
        backend->embed(out.tensor(), gathered, identity.data());
        for (int64_t i = 0; i < 37; ++i) {
          same = same && equal_bits(out.row(i), want.row(subset[static_cast<size_t>(i)]), kIn);
        }
        CHECK(same);
        Matrix x(3, kIn, random);
        Matrix y(3, 101);
        Matrix z(3, 37);
        backend->linear(y.tensor(), x.tensor(), weight);
        backend->linear(z.tensor(), x.tensor(), gathered);
        for (int64_t i = 0; i < 37; ++i) {
          same = same && z.row(1)[i] == y.row(1)[subset[static_cast<size_t>(i)]];
        }
        CHECK(same);
      }
    }
  }
}

TEST_CASE("conversions round to nearest even and keep special values") {
  // Every fp16 value goes to fp32 and back; bf16 likewise.
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    std::vector<uint16_t> all(65536);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
    std::vector<float> wide(all.size());
    std::vector<uint16_t> back(all.size());
    convert(wide.data(), DType::kF32, all.data(), dtype, 65536);
    convert(back.data(), dtype, wide.data(), DType::kF32, 65536);
    int64_t wrong = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      if (std::isnan(wide[i])) {
        float again;
        convert(&again, DType::kF32, &back[i], dtype, 1);
        wrong += std::isnan(again) ? 0 : 1;
      } else {
        wrong += back[i] == all[i] ? 0 : 1;
      }
      // Half way to the next value: the even one of the two.
      const bool finite_pair = i + 1 < all.size() && std::isfinite(wide[i]) &&
                               std::isfinite(wide[i + 1]) && (i & 0x7fff) != 0x7fff;
      if (finite_pair) {
        const float middle = static_cast<float>((double{wide[i]} + wide[i + 1]) / 2);
        uint16_t rounded;
        convert(&rounded, dtype, &middle, DType::kF32, 1);
        const uint16_t even = static_cast<uint16_t>(i % 2 == 0 ? i : i + 1);
        if (double{middle} == (double{wide[i]} + wide[i + 1]) / 2) wrong += rounded == even ? 0 : 1;
      }
    }
    CHECK(wrong == 0);
  }
  const float large[] = {65519.0f, 65520.0f, -1e30f};
  uint16_t halves[3];
  convert(halves, DType::kF16, large, DType::kF32, 3);
  CHECK(halves[0] == 0x7bff);
  CHECK(halves[1] == 0x7c00);
  CHECK(halves[2] == 0xfc00);
}

TEST_CASE("linear refuses shapes that do not fit") {
  TestBackend backend(*kernels_portable(), 1, product_limits(4, 16));
  Random random(1);
  TestWeight weight(*backend, DType::kF32, Matrix(8, 16, random));
  Matrix x(2, 15);
  Matrix y(2, 8);
  CHECK_THROWS_AS(backend->linear(y.tensor(), x.tensor(), weight.weight()), Error);
  Matrix many(5, 16);
  Matrix many_out(5, 8);
  CHECK_THROWS_AS(backend->linear(many_out.tensor(), many.tensor(), weight.weight()), Error);
}

}  // namespace frspec::cpu
