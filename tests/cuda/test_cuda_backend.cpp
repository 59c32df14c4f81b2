// What the backend keeps between ops: a product whose parts are not added yet is whole for whatever
// comes next, recorded or not.
#include <cmath>
#include <functional>
#include <stdexcept>

#include "cuda_backend.h"
#include "cuda_test_support.h"

namespace frspec::cuda {
namespace {

constexpr DType kType = DType::kBF16;
constexpr int64_t kRows = 9;
constexpr int64_t kPromptRows = 65;  // by cuBLAS, in buffers of a multiple of kPromptRowMultiple
constexpr int64_t kIn = 512;         // two parts
constexpr int64_t kOut = 128;
constexpr float kEps = 1e-5f;

class Products {
 public:
  Products()
      : random_(3),
        x_(kType, kPromptRowMultiple, kIn, random_),
        first_(kType, kOut, kIn, random_, 0.1f),
        second_(kType, kOut, kOut, random_, 0.1f),
        before_(kType, kPromptRowMultiple, kOut, random_),
        hidden_(kType, kPromptRowMultiple, kOut),
        result_(kType, kPromptRowMultiple, kOut),
        scale_(std::vector<float>(kOut, 0.5f)),
        rows_(std::vector<int32_t>{4, 0, 8, 1, 1, 2, 3, 5, 7}) {
    WorkspaceLimits limits;
    limits.rows = kPromptRowMultiple;
    limits.round_rows = limits.choice_rows = limits.beam_rows = kRows;
    limits.vocab = kOut;
    limits.visible = 64;
    limits.query_heads = limits.group_heads = 1;
    limits.head_dim = 64;
    limits.in_features = kIn;
    limits.out_features = limits.ffn_features = kOut;
    Arena planning;
    backend_.layout(planning, limits);
    Arena arena(backend_.allocate(planning.used_bytes()), planning.used_bytes());
    backend_.layout(arena, limits);
    backend_.end_load();
    REQUIRE(split().parts > 1);
  }

  LinearSplit split() const {
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "asking");
    return split_linear(kOut, kIn, false, multiprocessors);
  }
  CudaBackend& backend() { return backend_; }
  Tensor x(int64_t n = kRows) const { return x_.tensor().row_slice(0, n); }
  Tensor hidden(int64_t n = kRows) const { return hidden_.tensor().row_slice(0, n); }
  Tensor result(int64_t n = kRows) const { return result_.tensor().row_slice(0, n); }
  LinearWeight first() const { return weight(first_); }
  LinearWeight second() const { return weight(second_); }
  const float* scale() const { return scale_.data(); }
  const int32_t* rows() const { return rows_.data(); }

  // hidden += first . x, as the layers do it.
  void multiply() {
    const Tensor residual = hidden();
    backend_.linear(hidden(), x(), first(), Rows::kTarget, &residual);
  }

  // The bits of hidden and result after `work` over the same beginning.
  std::vector<float> after(const std::function<void()>& work) {
    for (int64_t r = 0; r < before_.rows(); ++r) {
      std::copy_n(before_.row(r), kOut, hidden_.row(r));
      std::fill_n(result_.row(r), kOut, 0.0f);
    }
    hidden_.upload();
    result_.upload();
    work();
    backend_.synchronize();
    const Stream stream;
    hidden_.download(stream);
    result_.download(stream);
    std::vector<float> bits;
    for (const DeviceMatrix* each : {&hidden_, &result_}) {
      for (int64_t r = 0; r < kPromptRows; ++r) {
        bits.insert(bits.end(), each->row(r), each->row(r) + kOut);
      }
    }
    return bits;
  }

  // `work` in a run, whose first is not recorded, whose second is, and whose third is replayed.
  void check_runs(const char* name, const std::function<void()>& work,
                  const std::function<void(cudaStream_t)>& expected) {
    CAPTURE(name);
    const WorkKey key{WorkKey::kPlainRound, ++keys_, 0};
    const std::vector<float> want = after([&] {
      const Stream stream;
      expected(stream);
      check(cudaStreamSynchronize(stream), "test");
    });
    for (int turn = 0; turn < 3; ++turn) {
      CAPTURE(turn);
      const std::vector<float> got = after([&] { backend_.run(key, work); });
      CHECK(equal_bits(got.data(), want.data(), static_cast<int64_t>(want.size())));
    }
  }

  // The whole product by itself.
  void multiply_on(cudaStream_t stream) const {
    const Tensor residual = hidden();
    multiply_on(stream, hidden(), x(), first(), &residual);
  }
  void multiply_on(cudaStream_t stream, const Tensor& out, const Tensor& in, const LinearWeight& w,
                   const Tensor* residual) const {
    const LinearSplit parts = w.in_features == kIn ? split() : split_in_parts(kOut, 1);
    const size_t floats = linear_scratch(out.rows, kOut, false, parts);
    const DeviceArray<float> sums(floats);
    linear(out, in, w, nullptr, residual, parts, {sums.data(), floats}, stream);
    check(cudaStreamSynchronize(stream), "test");
  }

 private:
  static LinearWeight weight(const DeviceMatrix& matrix) {
    return {matrix.tensor().data, kType, matrix.rows(), matrix.cols(), nullptr};
  }

  Random random_;
  CudaBackend backend_{0};
  DeviceMatrix x_, first_, second_, before_, hidden_, result_;
  DeviceArray<float> scale_;
  DeviceArray<int32_t> rows_;
  int32_t keys_ = 0;
};

}  // namespace

TEST_CASE("a product of several parts is whole for whatever comes next") {
  Products p;
  CudaBackend& backend = p.backend();
  p.check_runs(
      "nothing", [&] { p.multiply(); }, [&](cudaStream_t s) { p.multiply_on(s); });
  p.check_runs(
      "its norm",
      [&] {
        p.multiply();
        backend.rms_norm(p.result(), p.hidden(), p.scale(), kEps);
      },
      [&](cudaStream_t s) {
        p.multiply_on(s);
        rms_norm(p.result(), p.hidden(), p.scale(), kEps, nullptr, s);
      });
  p.check_runs(
      "the norm of some of its rows",
      [&] {
        p.multiply();
        backend.rms_norm(p.result(3), p.hidden(3), p.scale(), kEps);
      },
      [&](cudaStream_t s) {
        p.multiply_on(s);
        rms_norm(p.result(3), p.hidden(3), p.scale(), kEps, nullptr, s);
      });
  p.check_runs(
      "another product, whose parts wait in the same scratch memory",
      [&] {
        p.multiply();
        backend.linear(p.result(), p.x(), p.first(), Rows::kTarget, nullptr);
      },
      [&](cudaStream_t s) {
        p.multiply_on(s);
        p.multiply_on(s, p.result(), p.x(), p.first(), nullptr);
      });
  p.check_runs(
      "a product of it",
      [&] {
        p.multiply();
        backend.linear(p.result(), p.hidden(), p.second(), Rows::kTarget, nullptr);
      },
      [&](cudaStream_t s) {
        p.multiply_on(s);
        p.multiply_on(s, p.result(), p.hidden(), p.second(), nullptr);
      });
  p.check_runs(
      "rows of it",
      [&] {
        p.multiply();
        backend.gather_rows(p.result(), p.hidden(), p.rows());
      },
      [&](cudaStream_t s) {
        p.multiply_on(s);
        copy_rows(p.result(), p.hidden().data, p.hidden().stride, kRows, p.rows(), s);
      });
  p.check_runs(
      "what overwrites it",
      [&] {
        p.multiply();
        backend.gather_rows(p.hidden(), p.x().col_slice(0, kOut), p.rows());
      },
      [&](cudaStream_t s) { copy_rows(p.hidden(), p.x().data, p.x().stride, kRows, p.rows(), s); });
}

TEST_CASE("a prompt's product waits for the parts of the one in front") {
  Products p;
  const auto prompt_product = [&] {
    p.backend().linear(p.result(kPromptRows), p.hidden(kPromptRows), p.second(), Rows::kPrompt,
                       nullptr);
  };
  const std::vector<float> want = p.after([&] {
    const Stream stream;
    p.multiply_on(stream);
    prompt_product();
  });
  const std::vector<float> got = p.after([&] {
    p.multiply();
    prompt_product();
  });
  CHECK(equal_bits(got.data(), want.data(), static_cast<int64_t>(want.size())));
}

TEST_CASE("a prompt's product has its bias and its residual") {
  Products p;
  std::vector<float> bias(kOut);
  for (int64_t i = 0; i < kOut; ++i) bias[static_cast<size_t>(i)] = static_cast<float>(i) - 60.0f;
  const DeviceArray<float> of_device(bias);
  LinearWeight with_bias = p.first();
  with_bias.bias = of_device.data();
  const auto multiply = [&](const LinearWeight& w, bool adds) {
    return p.after([&] {
      const Tensor residual = p.hidden(kPromptRows);
      p.backend().linear(p.result(kPromptRows), p.x(kPromptRows), w, Rows::kPrompt,
                         adds ? &residual : nullptr);
    });
  };
  const std::vector<float> plain = multiply(p.first(), false);
  const std::vector<float> biased = multiply(with_bias, false);
  const std::vector<float> added = multiply(with_bias, true);
  const size_t rows = kPromptRows * kOut;  // of hidden, then of the results
  for (size_t i = 0; i < rows; ++i) {
    const float want = plain[rows + i] + bias[i % kOut];
    // Each of the values is rounded to bf16.
    const float allowed = 0x1p-8f * (std::fabs(plain[rows + i]) + std::fabs(want)) + 1e-3f;
    CHECK(std::fabs(biased[rows + i] - want) <= allowed);
    CHECK(std::fabs(added[rows + i] - want - added[i]) <=
          allowed + 0x1p-7f * (std::fabs(added[i]) + std::fabs(want)));
  }
}

TEST_CASE("work of another kind, size or bound of the sequence has a recording of its own") {
  Products p;
  std::vector<WorkKey> keys{{WorkKey::kPlainRound, 1, 512},
                            {WorkKey::kPlainRound, 1, 1024},
                            {WorkKey::kPlainRound, 2, 512},
                            {WorkKey::kDraftedRound, 1, 512},
                            {WorkKey::kDraftedRound, 1, 512, true}};
  // Each copies another row to the front; the first two turns are not replays.
  for (int turn = 0; turn < 4; ++turn) {
    for (size_t i = 0; i < keys.size(); ++i) {
      CAPTURE(turn);
      CAPTURE(i);
      const int32_t* rows = p.rows() + (i < 4 ? i : 5);
      const std::vector<float> got = p.after([&] {
        p.backend().run(keys[i], [&] { p.backend().gather_rows(p.result(1), p.hidden(), rows); });
      });
      const std::vector<float> want =
          p.after([&] { p.backend().gather_rows(p.result(1), p.hidden(), rows); });
      CHECK(equal_bits(got.data(), want.data(), static_cast<int64_t>(want.size())));
    }
  }
}

TEST_CASE("a recording that fails leaves nothing behind") {
  Products p;
  const WorkKey key{WorkKey::kPlainRound, 1, 0};
  const auto work = [&] {
    p.backend().gather_rows(p.result(), p.hidden(), p.rows());
    p.backend().mark(0);
  };
  const std::vector<float> want = p.after(work);
  p.after([&] { p.backend().run(key, work); });
  CHECK_THROWS_AS(p.backend().run(key,
                                  [&] {
                                    work();
                                    throw std::runtime_error("planned");
                                  }),
                  std::runtime_error);
  // Neither the stream nor the marks take themselves to be recorded still.
  CHECK(p.after(work) == want);
  p.backend().mark(1);
  p.backend().synchronize();
  CHECK(p.backend().seconds_between(0, 1) >= 0);
  for (int turn = 0; turn < 2; ++turn) CHECK(p.after([&] { p.backend().run(key, work); }) == want);
}

TEST_CASE("a download and a post see a product whole") {
  Products p;
  const std::vector<float> want = p.after([&] {
    const Stream stream;
    p.multiply_on(stream);
  });
  std::vector<uint16_t> row(kOut);
  std::vector<float> values(kOut);
  const auto check_row = [&](const void* from) {
    cpu::convert(values.data(), DType::kF32, from, kType, kOut);
    CHECK(equal_bits(values.data(), want.data(), kOut));
  };
  p.after([&] {
    p.multiply();
    p.backend().download(row.data(), p.hidden().data, kOut * sizeof(uint16_t));
    check_row(row.data());
  });
  p.after([&] {
    p.multiply();
    p.backend().post(p.hidden().data, kOut * sizeof(uint16_t));
    p.backend().synchronize();
    check_row(p.backend().mailbox());
  });
}

TEST_CASE("a product of work that failed is forgotten") {
  Products p;
  const WorkKey key{WorkKey::kPlainRound, 1, 0};
  const auto failing = [&] {
    p.multiply();
    throw std::runtime_error("planned");
  };
  CHECK_THROWS_AS(p.backend().run(key, failing), std::runtime_error);
  const std::vector<float> untouched = p.after([] {});
  const std::vector<float> got = p.after([&] {
    p.backend().run(key, [&] { p.backend().gather_rows(p.result(0), p.hidden(0), p.rows()); });
  });
  CHECK(equal_bits(got.data(), untouched.data(), static_cast<int64_t>(got.size())));
}

}  // namespace frspec::cuda
