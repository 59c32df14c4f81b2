#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu_test_support.h"

namespace frspec::cpu {
namespace {

WorkspaceLimits limits_for(int64_t rows, int64_t vocab) {
  WorkspaceLimits limits;
  limits.rows = rows;
  limits.vocab = vocab;
  return limits;
}

}  // namespace

TEST_CASE("topk_logprobs equals a sorted double-precision log-softmax") {
  for (const Kernels* kernels : all_kernels()) {
    CAPTURE(kernels->name);
    for (const int64_t cols : {64, 65, 1000, 16384, 16385, 50001}) {
      TestBackend backend(*kernels, 2, limits_for(3, cols));
      for (const int64_t k : {1, 2, 10, 64}) {
        const int64_t n = k == 10 ? 7 : 2;  // more rows than planned for at once
        Random random(static_cast<uint32_t>(cols + k));
        Matrix logits(n, cols, random, 4.0f, 3);
        // Ties, also across chunks.
        for (int64_t i = 0; i < cols; i += 97) logits.row(0)[i] = 12.5f;
        std::vector<int32_t> ids(static_cast<size_t>(cols));
        for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(3 * i + 1);
        const bool mapped = k != 2;
        std::vector<float> logprobs(static_cast<size_t>(n * k));
        std::vector<int32_t> tokens(static_cast<size_t>(n * k));
        backend->topk_logprobs(logprobs.data(), tokens.data(), logits.tensor(),
                               mapped ? ids.data() : nullptr, k);
        for (int64_t r = 0; r < n; ++r) {
          const float* row = logits.row(r);
          std::vector<int32_t> order(static_cast<size_t>(cols));
          std::iota(order.begin(), order.end(), 0);
          std::stable_sort(order.begin(), order.end(),
                           [&](int32_t a, int32_t b) { return row[a] > row[b]; });
          double sum = 0;
          for (int64_t i = 0; i < cols; ++i) sum += std::exp(double{row[i]} - row[order[0]]);
          for (int64_t i = 0; i < k; ++i) {
            const int32_t column = order[static_cast<size_t>(i)];
            CHECK(tokens[static_cast<size_t>(r * k + i)] == (mapped ? 3 * column + 1 : column));
            const double want = double{row[column]} - row[order[0]] - std::log(sum);
            CHECK(std::fabs(logprobs[static_cast<size_t>(r * k + i)] - want) < 2e-6 * (1 - want));
          }
        }
      }
    }
  }
}

TEST_CASE("topk_logprobs gives valid columns for NaN and infinite logits") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const Kernels* kernels : all_kernels()) {
    TestBackend backend(*kernels, 2, limits_for(4, 40000));
    Matrix logits(4, 40000);
    std::fill_n(logits.row(0), 40000, NAN);
    std::fill_n(logits.row(1), 40000, -inf);
    logits.row(2)[30000] = inf;
    logits.row(3)[0] = NAN;
    logits.row(3)[20000] = 5.0f;
    float logprobs[20];
    int32_t tokens[20];
    backend->topk_logprobs(logprobs, tokens, logits.tensor(), nullptr, 5);
    for (const int32_t token : tokens) CHECK((token >= 0 && token < 40000));
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 5; ++i) {
        for (int j = 0; j < i; ++j) CHECK(tokens[r * 5 + i] != tokens[r * 5 + j]);
      }
    }
    for (int i = 0; i < 5; ++i) {
      CHECK(logprobs[i] == -inf);
      CHECK(logprobs[5 + i] == -inf);
      CHECK(logprobs[10 + i] == (i == 0 ? 0.0f : -inf));
      // 39,998 logits of 0 beside the one of 5.
      const double want = (i == 0 ? 5.0 : 0.0) - std::log(39998 + std::exp(5.0));
      CHECK(std::fabs(logprobs[15 + i] - want) < 1e-5 * -want);
    }
    CHECK(tokens[10] == 30000);
    CHECK(tokens[15] == 20000);
    CHECK(tokens[16] == 1);
  }
}

}  // namespace frspec::cpu
