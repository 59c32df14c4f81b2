// topk_logprobs and choose_tokens against the CPU backend on the same logits.
#include <algorithm>
#include <limits>

#include "cuda_test_support.h"

namespace frspec::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A CPU backend with the workspace for such logits.
std::unique_ptr<Backend> cpu_backend(int64_t rows, int64_t vocab) {
  auto backend = cpu::make_cpu_backend(2);
  WorkspaceLimits limits;
  limits.rows = limits.choice_rows = rows;
  limits.vocab = vocab;
  Arena plan;
  backend->layout(plan, limits);
  Arena arena(backend->allocate(plan.used_bytes()), plan.used_bytes());
  backend->layout(arena, limits);
  return backend;
}

Tensor host_tensor(DeviceMatrix& m) {
  return {m.row(0), DType::kF32, m.rows(), m.cols(), m.tensor().stride};
}

// coarse: logits on a grid, so that there are ties.
DeviceMatrix random_logits(int64_t rows, int64_t vocab, bool coarse, Random& random) {
  DeviceMatrix logits(DType::kF32, rows, vocab, 4);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < vocab; ++i) {
      const float value = random.normal(3.0f);
      logits.row(r)[i] = coarse ? std::round(value * 2) / 2 : value;
    }
  }
  logits.upload();
  return logits;
}

// columns: token ids, or empty for the identity.
void compare_topk(DeviceMatrix& logits, int64_t k, const std::vector<int32_t>& columns) {
  const int64_t rows = logits.rows();
  const int64_t vocab = logits.cols();
  Stream stream;
  const DeviceArray<int32_t> device_columns(columns);
  const auto count = static_cast<size_t>(rows * k);
  const auto chunks = static_cast<size_t>(rows * topk_chunks(vocab));
  const DeviceArray<float2> sums(chunks);
  const DeviceArray<uint64_t> entries(chunks * static_cast<size_t>(k));
  const DeviceArray<float> logprobs(count);
  const DeviceArray<int32_t> tokens(count);
  topk_logprobs(logprobs.data(), tokens.data(), logits.tensor(),
                columns.empty() ? nullptr : device_columns.data(), k,
                {sums.data(), sums.size(), entries.data(), entries.size()}, stream);
  const auto got_logprobs = logprobs.get(stream);
  const auto got_tokens = tokens.get(stream);

  std::vector<float> want_logprobs(count);
  std::vector<int32_t> want_tokens(count);
  cpu_backend(rows, vocab)
      ->topk_logprobs(want_logprobs.data(), want_tokens.data(), host_tensor(logits),
                      columns.empty() ? nullptr : columns.data(), k);
  CHECK(got_tokens == want_tokens);
  double worst = 0;
  for (size_t i = 0; i < count; ++i) {
    if (got_logprobs[i] == want_logprobs[i]) continue;  // also where both are infinite
    test::keep_worst(worst, std::fabs(double{got_logprobs[i]} - want_logprobs[i]));
  }
  CHECK(worst < 1e-4);
}

void check_topk(int64_t rows, int64_t vocab, int64_t k, bool coarse, bool mapped) {
  CAPTURE(vocab);
  CAPTURE(k);
  CAPTURE(coarse);
  Random random(static_cast<uint32_t>(vocab + k));
  DeviceMatrix logits = random_logits(rows, vocab, coarse, random);
  logits.row(0)[vocab / 2] = NAN;
  if (vocab > 2 * k) std::fill_n(logits.row(rows - 1), vocab / 3, -kInfinity);
  logits.upload();
  std::vector<int32_t> columns(mapped ? static_cast<size_t>(vocab) : 0);
  for (size_t i = 0; i < columns.size(); ++i) columns[i] = static_cast<int32_t>(3 * i + 7);
  compare_topk(logits, k, columns);
}

}  // namespace

TEST_CASE("topk_logprobs finds what the CPU finds") {
  for (const bool coarse : {false, true}) {
    check_topk(1, 1, 1, coarse, false);
    check_topk(3, 100, 10, coarse, true);
    check_topk(2, 64, 64, coarse, false);
    check_topk(2, 4096, 10, coarse, true);
    check_topk(3, 4100, 64, coarse, true);
    check_topk(10, 9000, 10, coarse, true);
  }
  check_topk(1, 151936, 10, false, false);
}

TEST_CASE("topk_logprobs of special values finds what the CPU finds") {
  constexpr int64_t kVocab = 5000;  // more than a chunk
  Random random(8);
  DeviceMatrix logits = random_logits(4, kVocab, false, random);
  for (int64_t i = 0; i < kVocab; ++i) logits.row(0)[i] = i % 2 == 0 ? NAN : -kInfinity;
  std::fill_n(logits.row(1), kVocab, -kInfinity);
  logits.row(2)[4500] = kInfinity;
  logits.row(2)[4800] = kInfinity;
  std::fill_n(logits.row(3), kVocab, NAN);
  logits.row(3)[4999] = 1.0f;
  logits.upload();
  compare_topk(logits, 6, {});
}

TEST_CASE("topk_logprobs refuses more than there is") {
  Stream stream;
  DeviceMatrix logits(DType::kF32, 1, 8);
  const DeviceArray<float> logprobs(65);
  const DeviceArray<int32_t> tokens(65);
  for (const int64_t k : {int64_t{0}, int64_t{9}, int64_t{65}}) {
    CHECK_THROWS_AS(
        topk_logprobs(logprobs.data(), tokens.data(), logits.tensor(), nullptr, k, {}, stream),
        Error);
  }
  // Enough for the sums, not for the entries.
  const DeviceArray<float2> sums(1);
  const DeviceArray<uint64_t> entries(3);
  CHECK_THROWS_WITH_AS(topk_logprobs(logprobs.data(), tokens.data(), logits.tensor(), nullptr, 4,
                                     {sums.data(), 1, entries.data(), 3}, stream),
                       doctest::Contains("exceed the planned workspace"), Error);
}

TEST_CASE("choose_tokens chooses what the CPU chooses") {
  for (const int64_t vocab : {1, 7, 1000, 4096, 4099, 10001}) {
    for (const bool coarse : {false, true}) {
      CAPTURE(vocab);
      CAPTURE(coarse);
      constexpr int64_t kRows = 9;
      Stream stream;
      Random random(static_cast<uint32_t>(vocab));
      DeviceMatrix logits = random_logits(kRows, vocab, coarse, random);
      std::vector<int32_t> positions;
      for (int32_t r = 0; r < kRows; ++r) positions.push_back(100 + 17 * r);
      const DeviceArray<int32_t> device_positions(positions);
      const DeviceArray<uint64_t> scratch(static_cast<size_t>(kRows * 2 * choice_chunks(vocab)));
      const DeviceArray<int32_t> tokens(kRows);
      const auto cpu = cpu_backend(kRows, vocab);
      const Sampling samplings[] = {
          {},
          {1.0f, 0, 1.0f, 0.0f, 5},
          {0.7f, 0, 1.0f, 0.0f, uint64_t{1} << 40},
          {1.0f, 5, 1.0f, 0.0f, 6},
          {1.3f, 1, 1.0f, 0.0f, 7},
          {1.0f, 0, 0.9f, 0.0f, 8},
          {0.8f, 0, 0.3f, 0.0f, 9},
          {1.0f, 0, 1.0f, 0.05f, 10},
          {1.0f, 50, 0.8f, 0.01f, 11},
          {2.0f, 3, 0.99f, 1.0f, 12},
          {0.01f, 20, 0.5f, 0.0f, 13},
      };
      for (const Sampling& sampling : samplings) {
        CAPTURE(sampling.seed);
        const DeviceArray<Sampling> device_sampling(std::vector<Sampling>{sampling});
        choose_tokens(tokens.data(), logits.tensor(), device_sampling.data(),
                      device_positions.data(), {scratch.data(), scratch.size()}, stream);
        std::vector<int32_t> want(kRows);
        cpu->choose_tokens(want.data(), host_tensor(logits), &sampling, positions.data());
        CHECK(tokens.get(stream) == want);
      }
    }
  }
}

TEST_CASE("a row's choice does not depend on the rows beside it") {
  constexpr int64_t kVocab = 5000;
  constexpr int64_t kRows = 12;
  Stream stream;
  Random random(3);
  DeviceMatrix logits = random_logits(kRows, kVocab, false, random);
  std::vector<int32_t> positions;
  for (int32_t r = 0; r < kRows; ++r) positions.push_back(7 * r);
  const DeviceArray<int32_t> device_positions(positions);
  const DeviceArray<uint64_t> scratch(static_cast<size_t>(kRows * 2 * choice_chunks(kVocab)));
  for (const Sampling& sampling : {Sampling{1.0f, 0, 1.0f, 0.0f, 1}, {1.0f, 40, 0.9f, 0.0f, 2}}) {
    const DeviceArray<Sampling> device_sampling(std::vector<Sampling>{sampling});
    const DeviceArray<int32_t> all(kRows);
    choose_tokens(all.data(), logits.tensor(), device_sampling.data(), device_positions.data(),
                  {scratch.data(), scratch.size()}, stream);
    const auto together = all.get(stream);
    const DeviceArray<int32_t> one(1);
    for (int64_t r = 0; r < kRows; ++r) {
      choose_tokens(one.data(), logits.tensor().row_slice(r, 1), device_sampling.data(),
                    device_positions.data() + r, {scratch.data(), scratch.size()}, stream);
      CHECK(one.get(stream)[0] == together[static_cast<size_t>(r)]);
    }
  }
}

TEST_CASE("special values among the logits") {
  constexpr int64_t kVocab = 6000;
  Stream stream;
  Random random(4);
  DeviceMatrix logits = random_logits(6, kVocab, false, random);
  std::fill_n(logits.row(0), kVocab, NAN);
  std::fill_n(logits.row(1), kVocab, -kInfinity);
  logits.row(2)[5000] = kInfinity;
  std::fill_n(logits.row(3), kVocab, NAN);
  logits.row(3)[5999] = 1.0f;
  logits.row(4)[5] = NAN;
  logits.row(5)[7] = -kInfinity;
  logits.upload();
  const DeviceArray<int32_t> positions(std::vector<int32_t>{0, 1, 2, 3, 4, 5});
  const DeviceArray<uint64_t> scratch(static_cast<size_t>(6 * 2 * choice_chunks(kVocab)));
  const DeviceArray<int32_t> tokens(6);
  for (const float temperature : {0.0f, 1.0f, 1e-38f}) {
    for (const float top_p : {1.0f, 0.9f}) {
      for (const int32_t top_k : {0, 5}) {
        const DeviceArray<Sampling> sampling(
            std::vector<Sampling>{{temperature, top_k, top_p, 0.0f, 9}});
        choose_tokens(tokens.data(), logits.tensor(), sampling.data(), positions.data(),
                      {scratch.data(), scratch.size()}, stream);
        const auto got = tokens.get(stream);
        for (const int32_t token : got) CHECK((token >= 0 && token < kVocab));
        CHECK(got[2] == 5000);
        CHECK(got[3] == 5999);
      }
    }
  }
}

}  // namespace frspec::cuda
