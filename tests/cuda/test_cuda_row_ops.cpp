// RMSNorm, RoPE with append, gathers and the commit of accepted KV rows.
#include <algorithm>
#include <cmath>

#include "cuda_test_support.h"
#include "synthetic.h"

namespace frspec::cuda {

TEST_CASE("rms_norm equals the formula, and a row's bits depend on that row alone") {
  for (const DType dtype : kElementTypes) {
    for (const int64_t d : {8, 72, 576, 896, 4096}) {
      Stream stream;
      Random random(static_cast<uint32_t>(d));
      const DeviceMatrix x(dtype, 5, d, random, 3.0f, 8);
      std::vector<float> weight(static_cast<size_t>(d));
      for (float& value : weight) value = random.normal();
      const DeviceArray<float> device_weight(weight);
      DeviceMatrix y(dtype, 5, d);
      DeviceMatrix alone(dtype, 1, d);
      rms_norm(y.tensor(), x.tensor(), device_weight.data(), 1e-5f, nullptr, stream);
      rms_norm(alone.tensor(), x.tensor().row_slice(3, 1), device_weight.data(), 1e-5f, nullptr,
               stream);
      y.download(stream);
      alone.download(stream);
      CHECK(equal_bits(alone.row(0), y.row(3), d));
      for (int64_t r = 0; r < 5; ++r) {
        double squares = 0;
        for (int64_t i = 0; i < d; ++i) squares += double{x.row(r)[i]} * x.row(r)[i];
        const double scale = 1 / std::sqrt(squares / static_cast<double>(d) + 1e-5);
        double worst = 0;
        for (int64_t i = 0; i < d; ++i) {
          const double want = x.row(r)[i] * scale * weight[static_cast<size_t>(i)];
          const double allowed = std::fabs(want) * (epsilon(dtype) + 1e-6) + 1e-7;
          test::keep_worst(worst, std::fabs(want - y.row(r)[i]) / allowed);
        }
        CHECK(worst <= 1.0);
      }
    }
  }
}

TEST_CASE("rope_and_append rotates by halves and places keys and values") {
  for (const DType dtype : kElementTypes) {
    for (const int64_t head_dim : {8, 24, 64, 128}) {
      constexpr int64_t kQueryHeads = 6;
      constexpr int64_t kHeads = 2;
      constexpr int64_t kRows = 11;
      constexpr int64_t kSlots = 40;
      Stream stream;
      Random random(static_cast<uint32_t>(head_dim));
      DeviceMatrix qkv(dtype, kRows, (kQueryHeads + 2 * kHeads) * head_dim, random, 1.0f, 8);
      std::vector<std::vector<float>> before;
      for (int64_t r = 0; r < kRows; ++r) before.emplace_back(qkv.row(r), qkv.row(r) + qkv.cols());
      DeviceMatrix keys(dtype, kHeads * kSlots, head_dim);
      DeviceMatrix values(dtype, kHeads * kSlots, head_dim);
      const KvLayer kv{keys.tensor().data, values.tensor().data, dtype, kHeads, kSlots, head_dim};
      DeviceMatrix rope(DType::kF32, 50, head_dim);
      for (int64_t p = 0; p < 50; ++p) {
        for (int64_t i = 0; i < head_dim / 2; ++i) {
          const double angle = static_cast<double>(p) / static_cast<double>(i + 1);
          rope.row(p)[i] = static_cast<float>(std::cos(angle));
          rope.row(p)[head_dim / 2 + i] = static_cast<float>(std::sin(angle));
        }
      }
      rope.upload();
      std::vector<int32_t> positions, slots;
      for (int32_t r = 0; r < kRows; ++r) {
        positions.push_back(49 - 2 * r);
        slots.push_back((r * 3 + 5) % static_cast<int32_t>(kSlots));
      }
      const DeviceArray<int32_t> device_positions(positions);
      const DeviceArray<int32_t> device_slots(slots);
      rope_and_append(qkv.tensor(), kv, rope.tensor(), device_positions.data(), device_slots.data(),
                      nullptr, stream);
      qkv.download(stream);
      keys.download(stream);
      values.download(stream);
      double worst = 0;
      const int64_t half = head_dim / 2;
      for (int64_t r = 0; r < kRows; ++r) {
        const auto index = static_cast<size_t>(r);
        const float* turn = rope.row(positions[index]);
        for (int64_t h = 0; h < kQueryHeads + kHeads; ++h) {
          const float* from = before[index].data() + h * head_dim;
          const float* got = h < kQueryHeads ? qkv.row(r) + h * head_dim
                                             : keys.row((h - kQueryHeads) * kSlots + slots[index]);
          for (int64_t i = 0; i < half; ++i) {
            const double first =
                double{from[i]} * turn[i] - double{from[half + i]} * turn[half + i];
            const double second =
                double{from[half + i]} * turn[i] + double{from[i]} * turn[half + i];
            test::keep_worst(
                worst, std::fabs(first - got[i]) / (std::fabs(first) * epsilon(dtype) + 1e-6));
            test::keep_worst(worst, std::fabs(second - got[half + i]) /
                                        (std::fabs(second) * epsilon(dtype) + 1e-6));
          }
        }
        for (int64_t h = 0; h < kHeads; ++h) {
          CHECK(equal_bits(values.row(h * kSlots + slots[index]),
                           before[index].data() + (kQueryHeads + kHeads + h) * head_dim, head_dim));
        }
      }
      CHECK(worst <= 1.0);
    }
  }
}

TEST_CASE("copy_rows copies the named rows, and the nearest ones for rows outside") {
  Stream stream;
  Random random(1);
  const DeviceMatrix source(DType::kF16, 5, 40, random, 1.0f, 8);
  DeviceMatrix out(DType::kF16, 6, 40, 16);
  const DeviceArray<int32_t> rows(std::vector<int32_t>{4, 0, 4, 2, -3, 100});
  copy_rows(out.tensor(), source.tensor().data, source.tensor().stride, 5, rows.data(), stream);
  out.download(stream);
  const int64_t want[] = {4, 0, 4, 2, 0, 4};
  for (int64_t r = 0; r < 6; ++r) CHECK(equal_bits(out.row(r), source.row(want[r]), 40));
}

TEST_CASE("number_rows numbers the last positions") {
  Stream stream;
  const DeviceArray<int32_t> end(std::vector<int32_t>{1000});
  for (const int64_t n : {1, 3, 256, 511}) {
    const DeviceArray<int32_t> positions(static_cast<size_t>(n));
    const DeviceArray<int32_t> prefix(static_cast<size_t>(n));
    number_rows(positions.data(), prefix.data(), end.data(), n, stream);
    const auto got = positions.get(stream);
    const auto got_prefix = prefix.get(stream);
    bool same = true;
    for (size_t i = 0; i < got.size(); ++i) {
      same = same && got[i] == 1000 - static_cast<int32_t>(n) + static_cast<int32_t>(i);
      same = same && got_prefix[i] == got[i] + 1;
    }
    CHECK(same);
  }
}

TEST_CASE("fill_rows, multiply_silu and add_silu are elementwise") {
  Stream stream;
  Random random(3);
  for (const DType dtype : kElementTypes) {
    const DeviceMatrix residual(dtype, 3, 40, random);
    const DeviceMatrix gate(dtype, 3, 40, random);
    DeviceMatrix out(dtype, 3, 40, 8);
    std::vector<float> bias(40);
    for (float& value : bias) value = random.normal();
    const DeviceArray<float> device_bias(bias);
    const Tensor added = residual.tensor();
    fill_rows(out.tensor(), device_bias.data(), &added, stream);
    out.download(stream);
    double worst = 0;
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t i = 0; i < 40; ++i) {
        const double want = double{bias[static_cast<size_t>(i)]} + residual.row(r)[i];
        test::keep_worst(
            worst, std::fabs(want - out.row(r)[i]) / (std::fabs(want) * epsilon(dtype) + 1e-7));
      }
    }
    CHECK(worst <= 1.0);
    DeviceMatrix up(dtype, 3, 40, random);
    std::vector<std::vector<float>> before;
    for (int64_t r = 0; r < 3; ++r) before.emplace_back(up.row(r), up.row(r) + 40);
    multiply_silu(up.tensor(), gate.tensor(), stream);
    up.download(stream);
    worst = 0;
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t i = 0; i < 40; ++i) {
        const double g = gate.row(r)[i];
        const double want =
            g / (1 + std::exp(-g)) * before[static_cast<size_t>(r)][static_cast<size_t>(i)];
        test::keep_worst(worst, std::fabs(want - up.row(r)[i]) /
                                    (std::fabs(want) * (epsilon(dtype) + 1e-5) + 1e-7));
      }
    }
    CHECK(worst <= 1.0);
    DeviceMatrix sum(dtype, 3, 40, random, 1.0f, 8);
    before.clear();
    for (int64_t r = 0; r < 3; ++r) before.emplace_back(sum.row(r), sum.row(r) + 48);
    add_silu(sum.tensor(), gate.tensor(), stream);
    sum.download(stream);
    worst = 0;
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t i = 0; i < 48; ++i) {
        const double old = before[static_cast<size_t>(r)][static_cast<size_t>(i)];
        if (i >= 40) {
          CHECK(sum.row(r)[i] == old);  // nothing behind the row
          continue;
        }
        const double g = gate.row(r)[i];
        const double want = old + g / (1 + std::exp(-g));
        test::keep_worst(
            worst, std::fabs(want - sum.row(r)[i]) / (std::fabs(want) * epsilon(dtype) + 1e-5));
      }
    }
    CHECK(worst <= 1.0);
    CHECK_THROWS_AS(add_silu(sum.tensor(), gate.tensor().row_slice(0, 2), stream), Error);
  }
}

TEST_CASE("commit_kv moves the accepted path to the front, in every layer and head") {
  for (const int64_t head_dim : {8, 64, 256}) {
    constexpr int64_t kHeads = 3;
    constexpr int64_t kLayers = 2;
    constexpr int64_t kSlots = 128;
    Stream stream;
    Random random(1);
    // Keys and values of layer 0, then of layer 1, as the KV cache lays them out.
    DeviceMatrix memory(DType::kBF16, kLayers * 2 * kHeads * kSlots, head_dim, random);
    std::vector<std::vector<float>> before;
    for (int64_t r = 0; r < memory.rows(); ++r) {
      before.emplace_back(memory.row(r), memory.row(r) + head_dim);
    }
    const auto block = [&](int64_t index) {
      return memory.tensor().row_slice(index * kHeads * kSlots, 1).data;
    };
    const KvLayer layers[] = {{block(0), block(1), DType::kBF16, kHeads, kSlots, head_dim},
                              {block(2), block(3), DType::kBF16, kHeads, kSlots, head_dim}};
    const int32_t base = 7;
    // A path may move into slots that it also leaves; the longest one has kMaxTreeDepth + 1 nodes.
    std::vector<int32_t> path{0, 2, 3, 9};
    for (int32_t node = 11; path.size() <= kMaxTreeDepth; node += 3) path.push_back(node);
    const DeviceArray<int32_t> device_base(std::vector<int32_t>{base});
    const DeviceArray<int32_t> device_path(path);
    for (const int32_t length : {1, 4, static_cast<int32_t>(path.size())}) {
      const DeviceArray<int32_t> device_length(std::vector<int32_t>{length});
      commit_kv(layers, kLayers, device_base.data(), device_path.data(), device_length.data(),
                stream);
      memory.download(stream);
      bool same = true;
      for (int64_t b = 0; b < 2 * kLayers * kHeads; ++b) {
        for (int32_t slot = 0; slot < kSlots; ++slot) {
          const int32_t j = slot - base;
          const int32_t from = j >= 0 && j < length ? base + path[static_cast<size_t>(j)] : slot;
          same =
              same && equal_bits(memory.row(b * kSlots + slot),
                                 before[static_cast<size_t>(b * kSlots + from)].data(), head_dim);
        }
      }
      CHECK(same);
      for (int64_t r = 0; r < memory.rows(); ++r) {
        std::copy(before[static_cast<size_t>(r)].begin(), before[static_cast<size_t>(r)].end(),
                  memory.row(r));
      }
      memory.upload();
    }
  }
}

TEST_CASE("random weights come from the seed and the element alone") {
  for (const DType dtype : kElementTypes) {
    for (const auto& [rows, cols] : {std::pair{3, 8}, {70, 136}}) {
      Stream stream;
      DeviceMatrix out(dtype, rows, cols);
      fill_random(out.tensor(), 77, stream);
      out.download(stream);
      DeviceMatrix want(dtype, rows, cols);
      const float scale = std::sqrt(3.0f / static_cast<float>(cols));
      for (int64_t i = 0; i < rows * cols; ++i) {
        want.row(i / cols)[i % cols] = scale * synthetic_element(77, i);
      }
      want.upload();
      for (int64_t r = 0; r < rows; ++r) CHECK(equal_bits(out.row(r), want.row(r), cols));
    }
  }
}

}  // namespace frspec::cuda
