// choose_tokens against a brute-force reading of sampling.h.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "cpu_test_support.h"

namespace frspec::cpu {
namespace {

WorkspaceLimits limits_for(int64_t rows, int64_t vocab) {
  WorkspaceLimits limits;
  limits.choice_rows = rows;
  limits.vocab = vocab;
  return limits;
}

bool likelier(const float* row, int32_t a, int32_t b) {
  return row[a] > row[b] || (row[a] == row[b] && a < b);
}

// The filtered set in double precision. `margin` becomes the relative distance of the closest
// decision: below about 1e-6 the set is not determined by the definition.
std::vector<int32_t> filtered(const float* row, int64_t vocab, const Sampling& sampling,
                              double& margin) {
  std::vector<int32_t> order(static_cast<size_t>(vocab));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return likelier(row, a, b); });
  const double max = row[order[0]];
  const auto weight = [&](int32_t token) {
    return std::exp((row[token] - max) / double{sampling.temperature});
  };
  if (sampling.top_k > 0 && sampling.top_k < vocab)
    order.resize(static_cast<size_t>(sampling.top_k));
  margin = 1;
  if (sampling.top_p < 1) {
    double total = 0;
    for (const int32_t token : order) total += weight(token);
    double mass = 0;
    size_t count = 0;
    while (count < order.size() && mass < sampling.top_p * total) {
      mass += weight(order[count++]);
      margin = std::min(margin, std::fabs(mass / total - sampling.top_p));
    }
    order.resize(count);
  }
  std::vector<int32_t> kept;
  for (const int32_t token : order) {
    if (weight(token) >= sampling.min_p) kept.push_back(token);
    if (sampling.min_p > 0) {
      margin = std::min(margin, std::fabs(weight(token) / sampling.min_p - 1));
    }
  }
  return kept;
}

int32_t brute_force(const float* row, const std::vector<int32_t>& set, const Sampling& sampling,
                    int32_t position) {
  float best = -std::numeric_limits<float>::infinity();
  int32_t token = -1;
  for (const int32_t candidate : set) {
    const RandomBlock block =
        token_noise_bits(sampling.seed, position, static_cast<uint32_t>(candidate) / 4);
    const float score =
        row[candidate] / sampling.temperature + gumbel_noise(block.words[candidate % 4]);
    if (score > best || token < 0 || (score == best && candidate < token)) {
      best = score;
      token = candidate;
    }
  }
  return token;
}

struct NamedBackend {
  const char* name;
  TestBackend backend;
};

// One for each instruction set, with two threads.
std::vector<NamedBackend> all_backends(const WorkspaceLimits& limits) {
  std::vector<NamedBackend> result;
  for (const Kernels* kernels : all_kernels()) {
    result.push_back({kernels->name, TestBackend(*kernels, 2, limits)});
  }
  return result;
}

void check_sampling(const std::vector<NamedBackend>& backends, Matrix& logits,
                    const Sampling& sampling) {
  const int64_t n = logits.rows();
  std::vector<int32_t> positions;
  std::vector<std::optional<int32_t>> wanted;  // none: not determined
  for (int32_t r = 0; r < n; ++r) {
    positions.push_back(100 * r + 3);
    double margin = 1;
    const auto set = filtered(logits.row(r), logits.cols(), sampling, margin);
    wanted.emplace_back();
    if (margin < 3e-6) continue;
    wanted.back() = brute_force(logits.row(r), set, sampling, positions.back());
  }
  for (const NamedBackend& each : backends) {
    CAPTURE(each.name);
    std::vector<int32_t> tokens(static_cast<size_t>(n), -1);
    each.backend->choose_tokens(tokens.data(), logits.tensor(), &sampling, positions.data());
    for (size_t r = 0; r < tokens.size(); ++r) {
      if (wanted[r]) CHECK(tokens[r] == *wanted[r]);
    }
  }
}

}  // namespace

TEST_CASE("at temperature 0 the lowest of the largest logits is chosen") {
  for (const Kernels* kernels : all_kernels()) {
    CAPTURE(kernels->name);
    for (const int64_t vocab : {1, 3, 100, 16384, 16390, 49155}) {
      for (const int threads : {1, 3}) {
        TestBackend backend(*kernels, threads, limits_for(9, vocab));
        Random random(static_cast<uint32_t>(vocab));
        Matrix logits(9, vocab, random, 3.0f, 2);
        for (int64_t i = vocab / 3; i < vocab; i += 1 + vocab / 7) logits.row(4)[i] = 40.0f;
        std::vector<int32_t> tokens(9), positions(9, 0);
        const Sampling greedy;
        backend->choose_tokens(tokens.data(), logits.tensor(), &greedy, positions.data());
        for (int64_t r = 0; r < 9; ++r) {
          const float* row = logits.row(r);
          CHECK(tokens[static_cast<size_t>(r)] == std::max_element(row, row + vocab) - row);
        }
      }
    }
  }
}

TEST_CASE("sampling without filters is the exact arg max over all tokens") {
  for (const int64_t vocab : {1, 5, 1000, 16385, 40003}) {
    const std::vector<NamedBackend> backends = all_backends(limits_for(12, vocab));
    Random random(static_cast<uint32_t>(vocab));
    for (const float spread : {0.0f, 0.01f, 2.0f, 5.0f, 30.0f}) {
      Matrix logits(12, vocab, random, spread);
      for (const float temperature : {0.05f, 0.7f, 1.0f, 10.0f}) {
        Sampling sampling;
        sampling.temperature = temperature;
        sampling.seed = static_cast<uint64_t>(random.below(1 << 30)) << 20;
        check_sampling(backends, logits, sampling);
      }
    }
  }
}

TEST_CASE("top-k, top-p and min-p keep exactly the tokens that their definition keeps") {
  for (const int64_t vocab : {5, 1000, 20001}) {
    const std::vector<NamedBackend> backends = all_backends(limits_for(6, vocab));
    Random random(static_cast<uint32_t>(vocab));
    for (const float spread : {0.0f, 0.5f, 3.0f}) {
      Matrix logits(6, vocab, random, spread);
      for (int64_t i = 0; i < vocab; ++i) {  // many ties
        logits.row(1)[i] = std::round(logits.row(1)[i]);
      }
      for (const int32_t top_k : {0, 1, 3, 50, 2000}) {
        for (const float top_p : {1.0f, 0.999f, 0.9f, 0.3f, 1e-6f}) {
          for (const float min_p : {0.0f, 0.05f, 1.0f}) {
            Sampling sampling;
            sampling.temperature = 0.8f;
            sampling.top_k = top_k;
            sampling.top_p = top_p;
            sampling.min_p = min_p;
            sampling.seed = static_cast<uint64_t>(random.below(1 << 30));
            CAPTURE(top_k);
            CAPTURE(top_p);
            CAPTURE(min_p);
            check_sampling(backends, logits, sampling);
          }
        }
      }
    }
  }
}

TEST_CASE("samples follow the softmax") {
  // Chi-square over 12 tokens, 24,000 draws; the 99.9 % point of 11 degrees of freedom is 31.3.
  TestBackend backend(*kernels_portable(), 1, limits_for(1000, 12));
  Random random(4);
  Matrix one(1, 12, random, 1.5f);
  Matrix logits(1000, 12);
  for (int64_t r = 0; r < 1000; ++r) std::copy_n(one.row(0), 12, logits.row(r));
  std::vector<double> seen(12, 0);
  for (int32_t draw = 0; draw < 24; ++draw) {
    Sampling sampling;
    sampling.temperature = 1.3f;
    sampling.seed = 1234;
    std::vector<int32_t> positions(1000), tokens(1000);
    std::iota(positions.begin(), positions.end(), draw * 1000);
    backend->choose_tokens(tokens.data(), logits.tensor(), &sampling, positions.data());
    for (const int32_t token : tokens) seen[static_cast<size_t>(token)] += 1;
  }
  double total = 0;
  for (int64_t i = 0; i < 12; ++i) total += std::exp(one.row(0)[i] / 1.3);
  double chi_square = 0;
  for (int64_t i = 0; i < 12; ++i) {
    const double want = 24000 * std::exp(one.row(0)[i] / 1.3) / total;
    chi_square +=
        (seen[static_cast<size_t>(i)] - want) * (seen[static_cast<size_t>(i)] - want) / want;
  }
  CHECK(chi_square < 31.3);
}

TEST_CASE("NaN and infinite logits give a valid token") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const Kernels* kernels : all_kernels()) {
    TestBackend backend(*kernels, 2, limits_for(6, 20000));
    Matrix logits(6, 20000);
    std::fill_n(logits.row(0), 20000, NAN);
    std::fill_n(logits.row(1), 20000, -inf);
    logits.row(2)[17000] = inf;
    std::fill_n(logits.row(3), 20000, NAN);
    logits.row(3)[19999] = 1.0f;
    logits.row(4)[5] = NAN;
    logits.row(5)[7] = -inf;
    const int32_t positions[6] = {0, 1, 2, 3, 4, 5};
    for (const float temperature : {0.0f, 1.0f, 1e-38f}) {
      for (const float top_p : {1.0f, 0.9f}) {
        for (const int32_t top_k : {0, 5}) {
          for (const float min_p : {0.0f, 0.1f}) {
            int32_t tokens[6];
            const Sampling sampling{temperature, top_k, top_p, min_p, 9};
            backend->choose_tokens(tokens, logits.tensor(), &sampling, positions);
            for (const int32_t token : tokens) CHECK((token >= 0 && token < 20000));
            CHECK(tokens[2] == 17000);
            CHECK(tokens[3] == 19999);
            CHECK(tokens[4] != 5);
            CHECK(tokens[5] != 7);
          }
        }
      }
    }
  }
}

}  // namespace frspec::cpu
