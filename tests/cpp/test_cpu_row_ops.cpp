// Norm, rotation and KV append, row copies and KV commit against plain loops.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "cpu_test_support.h"

namespace frspec::cpu {

TEST_CASE(
    "rms_norm equals the double-precision formula, and a row's bits do not depend on others") {
  for (const Kernels* kernels : all_kernels()) {
    CAPTURE(kernels->name);
    for (const int64_t cols : {1, 7, 72, 576, 896, 1793}) {
      TestBackend one(*kernels, 1, {});
      TestBackend three(*kernels, 3, {});
      Random random(static_cast<uint32_t>(cols));
      Matrix x(65, cols, random, 3.0f, 2);
      Matrix weight(1, cols, random);
      Matrix out(65, cols, 1);
      one->rms_norm(out.tensor(), x.tensor(), weight.row(0), 1e-5f);
      double worst = 0;
      for (int64_t r = 0; r < 65; ++r) {
        double squares = 0;
        for (int64_t i = 0; i < cols; ++i) squares += double{x.row(r)[i]} * x.row(r)[i];
        const double scale = 1 / std::sqrt(squares / static_cast<double>(cols) + 1e-5);
        for (int64_t i = 0; i < cols; ++i) {
          const double want = x.row(r)[i] * scale * weight.row(0)[i];
          test::keep_worst(worst, std::fabs(want - out.row(r)[i]) / (1 + std::fabs(want)));
        }
      }
      CHECK(worst < 1e-6);
      Matrix again(65, cols);
      three->rms_norm(again.tensor(), x.tensor(), weight.row(0), 1e-5f);
      Matrix alone(1, cols);
      for (int64_t r = 0; r < 65; ++r) {
        three->rms_norm(alone.tensor(), x.tensor().row_slice(r, 1), weight.row(0), 1e-5f);
        CHECK(equal_bits(again.row(r), out.row(r), cols));
        CHECK(equal_bits(alone.row(0), out.row(r), cols));
      }
      three->rms_norm(x.tensor(), x.tensor(), weight.row(0), 1e-5f);  // in place
      for (int64_t r = 0; r < 65; ++r) CHECK(equal_bits(x.row(r), out.row(r), cols));
    }
  }
}

TEST_CASE("add_silu adds y / (1 + exp(-y))") {
  for (const Kernels* kernels : all_kernels()) {
    CAPTURE(kernels->name);
    for (const int64_t cols : {1, 7, 72, 1793}) {
      TestBackend backend(*kernels, 3, {});
      Random random(static_cast<uint32_t>(cols));
      Matrix x(20, cols, random, 3.0f, 2);
      Matrix y(20, cols, random, 20.0f, 3);
      const Matrix before = x;
      backend->add_silu(x.tensor(), y.tensor());
      double worst = 0;
      for (int64_t r = 0; r < 20; ++r) {
        for (int64_t i = 0; i < cols; ++i) {
          const double v = y.row(r)[i];
          const double want = before.row(r)[i] + v / (1 + std::exp(-v));
          test::keep_worst(worst, std::fabs(want - x.row(r)[i]) / (1 + std::fabs(want)));
        }
        for (int64_t i = cols; i < cols + 2 && r < 19; ++i) {
          CHECK(x.row(r)[i] == before.row(r)[i]);  // nothing behind the row
        }
      }
      CHECK(worst < 1e-6);
    }
  }
}

TEST_CASE("rope_and_append rotates by halves and places keys and values") {
  for (const auto& [kernels, dtype] : all_kv_caches()) {
    CAPTURE(kernels->name);
    CAPTURE(dtype_name(dtype));
    for (const int64_t head_dim : {8, 24, 64, 80, 128}) {
      constexpr int64_t kQueryHeads = 6;
      constexpr int64_t kHeads = 2;
      constexpr int64_t kRows = 21;
      constexpr int32_t kSlots = 140;
      TestBackend backend(*kernels, 2, {});
      Random random(static_cast<uint32_t>(head_dim));
      Matrix qkv(kRows, (kQueryHeads + 2 * kHeads) * head_dim, random, 1.0f, 3);
      const Matrix before = qkv;
      Matrix rope(50, head_dim);
      for (int64_t p = 0; p < 50; ++p) {
        for (int64_t i = 0; i < head_dim / 2; ++i) {
          const double angle = static_cast<double>(p) / static_cast<double>(i + 1);
          rope.row(p)[i] = static_cast<float>(std::cos(angle));
          rope.row(p)[head_dim / 2 + i] = static_cast<float>(std::sin(angle));
        }
      }
      TestKv kv(kHeads, kSlots, head_dim, random);
      std::vector<int32_t> positions;
      std::vector<int32_t> slots;
      for (int32_t r = 0; r < kRows; ++r) {
        positions.push_back(49 - 2 * r);
        slots.push_back((r * 17 + 5) % kSlots);
      }
      backend->rope_and_append(qkv.tensor(), kv.pack(*backend, dtype), rope.tensor(),
                               positions.data(), slots.data());
      kv.unpack();
      double worst = 0;
      double worst_key = 0;  // error over the magnitude
      const int64_t half = head_dim / 2;
      for (int64_t r = 0; r < kRows; ++r) {
        const size_t index = static_cast<size_t>(r);
        const float* turn = rope.row(positions[index]);
        for (int64_t h = 0; h < kQueryHeads + kHeads; ++h) {
          const float* from = before.row(r) + h * head_dim;
          const float* got =
              h < kQueryHeads ? qkv.row(r) + h * head_dim : kv.key(h - kQueryHeads, slots[index]);
          for (int64_t i = 0; i < head_dim; ++i) {
            const double c = turn[i % half];
            const double s = i < half ? -turn[half + i] : turn[i];
            const double want = from[i] * c + from[(i + half) % head_dim] * s;
            const double error = std::fabs(want - got[i]);
            if (h < kQueryHeads) {
              test::keep_worst(worst, error);
            } else {
              test::keep_worst(worst_key, error / (std::fabs(want) + 1e-3));
            }
          }
        }
        for (int64_t h = 0; h < kHeads; ++h) {
          const float* want = before.row(r) + (kQueryHeads + kHeads + h) * head_dim;
          std::vector<float> rounded(want, want + head_dim);
          if (dtype == DType::kBF16) {
            std::vector<uint16_t> bf16(rounded.size());
            convert(bf16.data(), dtype, want, DType::kF32, head_dim);
            convert(rounded.data(), DType::kF32, bf16.data(), dtype, head_dim);
          }
          CHECK(equal_bits(kv.value(h, slots[index]), rounded.data(), head_dim));
        }
      }
      CHECK(worst < 1e-6);
      CHECK(worst_key < (dtype == DType::kBF16 ? 0.0045 : 1e-3));
    }
  }
}

TEST_CASE("gather_rows copies the named rows") {
  TestBackend backend(*kernels_portable(), 1, {});
  Random random(1);
  Matrix src(5, 33, random, 1.0f, 2);
  Matrix out(4, 33);
  const int32_t rows[] = {4, 0, 4, 2};
  backend->gather_rows(out.tensor(), src.tensor(), rows);
  for (int64_t r = 0; r < 4; ++r) CHECK(equal_bits(out.row(r), src.row(rows[r]), 33));
}

TEST_CASE("commit_kv moves the accepted path to the front, in every layer and head") {
  constexpr int64_t kHeads = 3;
  constexpr int32_t kSlots = 256;
  constexpr int64_t kHeadDim = 40;
  for (const auto& [kernels, dtype] : all_kv_caches()) {
    CAPTURE(kernels->name);
    CAPTURE(dtype_name(dtype));
    TestBackend backend(*kernels, 1, {});
    Random random(1);
    const int32_t base = 121;  // the path crosses a block of the cache
    const int32_t path[] = {0, 2, 3, 9};
    const int32_t length = 4;
    std::vector<TestKv> caches(2, TestKv(kHeads, kSlots, kHeadDim, random));
    caches[1] = TestKv(kHeads, kSlots, kHeadDim, random);
    const KvLayer layers[] = {caches[0].pack(*backend, dtype), caches[1].pack(*backend, dtype)};
    for (TestKv& cache : caches) cache.unpack();  // rounded
    std::vector<TestKv> before = caches;
    backend->commit_kv(layers, 2, &base, path, &length);
    for (size_t l = 0; l < 2; ++l) {
      caches[l].unpack();
      bool same = true;
      for (int64_t h = 0; h < kHeads; ++h) {
        for (int32_t slot = 0; slot < kSlots; ++slot) {
          const int32_t j = slot - base;
          const int32_t from = j >= 0 && j < length ? base + path[j] : slot;
          same = same && equal_bits(caches[l].key(h, slot), before[l].key(h, from), kHeadDim);
          same = same && equal_bits(caches[l].value(h, slot), before[l].value(h, from), kHeadDim);
        }
      }
      CHECK(same);
    }
  }
}

}  // namespace frspec::cpu
