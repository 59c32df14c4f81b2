// Activations that only products read: what an op writes in fp32, rounded to bf16.
#include <doctest/doctest.h>

#include <cstring>
#include <vector>

#include "attention_reference.h"
#include "cpu_test_support.h"

namespace frspec::cpu {
namespace {

// A matrix in bf16 with a stride of whole 32-bit units.
class Rounded {
 public:
  Rounded(int64_t rows, int64_t cols)
      : rows_(rows),
        cols_(cols),
        stride_((cols + 1) / 2 * 2 + 4),
        data_(static_cast<size_t>(rows * stride_), kUntouched) {}
  Tensor tensor() { return {data_.data(), DType::kBF16, rows_, cols_, stride_}; }

  // Whether it holds `wanted` rounded to nearest even, and nothing was written behind a row.
  bool equals(const Matrix& wanted) const {
    std::vector<uint16_t> row(static_cast<size_t>(cols_));
    for (int64_t r = 0; r < rows_; ++r) {
      convert(row.data(), DType::kBF16, wanted.row(r), DType::kF32, cols_);
      const uint16_t* found = data_.data() + r * stride_;
      if (std::memcmp(found, row.data(), row.size() * sizeof(uint16_t)) != 0) return false;
      if (cols_ % 2 == 1 && found[cols_] != 0) return false;
      for (int64_t c = (cols_ + 1) / 2 * 2; c < stride_; ++c) {
        if (found[c] != kUntouched) return false;
      }
    }
    return true;
  }

 private:
  static constexpr uint16_t kUntouched = 0x7fc0;  // NaN
  int64_t rows_, cols_, stride_;
  std::vector<uint16_t> data_;
};

std::vector<const Kernels*> rounding_kernels() {
  std::vector<const Kernels*> found;
  for (const Kernels* kernels : all_kernels()) {
    if (kernels->round_rows != nullptr) found.push_back(kernels);
  }
  return found;
}

}  // namespace

TEST_CASE("only products of bf16 weights, and by vdpbf16ps, want their rows in bf16") {
  for (const Kernels* kernels : all_kernels()) {
    const auto backend = make_cpu_backend(1, kernels);
    CHECK(backend->input_dtype(DType::kF32) == DType::kF32);
    CHECK(backend->input_dtype(DType::kF16) == DType::kF32);
    CHECK(backend->input_dtype(DType::kBF16) ==
          (kernels->round_rows != nullptr ? DType::kBF16 : DType::kF32));
  }
}

TEST_CASE("rms_norm and linear_swiglu write their fp32 results rounded, and linear reads them") {
  for (const Kernels* kernels : rounding_kernels()) {
    CAPTURE(kernels->name);
    for (const int64_t n : {1, 5, 70, 200}) {  // the last of two row blocks
      CAPTURE(n);
      for (const int64_t cols : {1, 33, 72, 577}) {
        if (n > 70 && cols != 33) continue;
        CAPTURE(cols);
        Random random(static_cast<uint32_t>(n + cols));
        TestBackend backend(*kernels, 2, product_limits(n, 600));
        Matrix x(n, cols, random, 1.0f, 3);
        Matrix norm_weight(1, cols, random);
        Matrix normed(n, cols);
        Rounded rounded(n, cols);
        backend->rms_norm(normed.tensor(), x.tensor(), norm_weight.row(0), 1e-5f);
        backend->rms_norm(rounded.tensor(), x.tensor(), norm_weight.row(0), 1e-5f);
        CHECK(rounded.equals(normed));

        constexpr int64_t kOut = 45;
        TestWeight gate(*backend, DType::kBF16, Matrix(kOut, cols, random));
        TestWeight up(*backend, DType::kBF16, Matrix(kOut, cols, random));
        Matrix product(n, kOut);
        Matrix of_rounded(n, kOut);
        backend->linear(product.tensor(), normed.tensor(), up.weight());
        backend->linear(of_rounded.tensor(), rounded.tensor(), up.weight());
        bool same = true;
        for (int64_t r = 0; r < n; ++r) {
          same = same && equal_bits(product.row(r), of_rounded.row(r), kOut);
        }
        CHECK(same);

        Rounded ffn(n, kOut);
        backend->linear_swiglu(product.tensor(), normed.tensor(), gate.weight(), up.weight());
        backend->linear_swiglu(ffn.tensor(), rounded.tensor(), gate.weight(), up.weight());
        CHECK(ffn.equals(product));
      }
    }
  }
}

TEST_CASE("attention writes its fp32 results rounded, with splits and without") {
  const test::AttentionShape shape{6, 2, 24};
  for (const Kernels* kernels : rounding_kernels()) {
    CAPTURE(kernels->name);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const int32_t before : {0, 200, 1300}) {
        for (const int64_t n : {1, 9, 65}) {
          WorkspaceLimits limits = product_limits(n, shape.query_heads * shape.head_dim);
          limits.visible = before + n;
          limits.query_heads = shape.query_heads;
          TestBackend backend(*kernels, 2, limits);
          Random random(static_cast<uint32_t>(n + before));
          TestKv cache(shape.heads, before + n, shape.head_dim, random);
          Matrix q(n, shape.query_heads * shape.head_dim, random, 2.0f);
          test::AttentionView view;
          for (int32_t r = 0; r < n; ++r) view.add(before + r + 1, {});
          Matrix out(n, q.cols());
          Rounded rounded(n, q.cols());
          backend->attention(out.tensor(), q.tensor(), cache.pack(*backend, dtype), view.visible());
          backend->attention(rounded.tensor(), q.tensor(), cache.pack(*backend, dtype),
                             view.visible());
          CAPTURE(n);
          CAPTURE(before);
          CHECK(rounded.equals(out));
        }
      }
    }
  }
}

TEST_CASE("activations and caches of another type are refused") {
  for (const Kernels* kernels : all_kernels()) {
    TestBackend backend(*kernels, 1, product_limits(2, 8));
    Random random(1);
    TestWeight weight(*backend, DType::kF16, Matrix(4, 8, random));
    Rounded x(2, 8);
    Rounded out(2, 4);
    Matrix fp32_out(2, 4);
    Matrix fp32_x(2, 8);
    CHECK_THROWS_AS(backend->linear(fp32_out.tensor(), x.tensor(), weight.weight()), Error);
    CHECK_THROWS_AS(backend->linear(out.tensor(), fp32_x.tensor(), weight.weight()), Error);

    // Outputs that the instruction set does not round to, and rows that are not whole.
    float norm_weight[8] = {};
    Tensor fp16 = x.tensor();
    fp16.dtype = DType::kF16;
    Tensor odd = x.tensor();
    odd.cols = odd.stride = 7;
    Tensor seven = fp32_x.tensor();
    seven.cols = 7;
    CHECK_THROWS_AS(backend->rms_norm(fp16, fp32_x.tensor(), norm_weight, 1e-5f), Error);
    CHECK_THROWS_AS(backend->rms_norm(odd, seven, norm_weight, 1e-5f), Error);
    if (kernels->round_rows == nullptr) {
      CHECK_THROWS_AS(backend->rms_norm(x.tensor(), fp32_x.tensor(), norm_weight, 1e-5f), Error);
      CHECK_THROWS_AS(
          backend->linear_swiglu(out.tensor(), fp32_x.tensor(), weight.weight(), weight.weight()),
          Error);
    }

    const int32_t base = 0;
    const int32_t length = 0;
    KvLayer cache{nullptr, nullptr, DType::kF16, 1, 128, 8};
    CHECK_THROWS_AS(backend->commit_kv(&cache, 1, &base, &base, &length), Error);
    cache.dtype = DType::kBF16;
    if (kernels->bf16_attention == nullptr) {
      CHECK_THROWS_AS(backend->commit_kv(&cache, 1, &base, &base, &length), Error);
    }
  }
}

}  // namespace frspec::cpu
