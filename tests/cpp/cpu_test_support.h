// Shared by the tests of the CPU backend: every instruction set that this machine can run (AVX-512
// also emulated), backends with a workspace, and random data.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "cpu/convert.h"
#include "cpu/cpu_backend.h"
#include "cpu/kv_layout.h"
#include "random.h"
#include "worst_error.h"

namespace frspec::cpu {

#ifdef FRSPEC_TEST_EMULATED_AVX512
const Kernels* kernels_avx512_emulated();
const Kernels* kernels_avx512_bf16_emulated();
#endif

inline std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> all = supported_kernels();
#ifdef FRSPEC_TEST_EMULATED_AVX512
  all.push_back(kernels_avx512_emulated());
  all.push_back(kernels_avx512_bf16_emulated());
#endif
  return all;
}

// Of products with rows of up to in_features.
inline WorkspaceLimits product_limits(int64_t rows, int64_t in_features) {
  WorkspaceLimits limits;
  limits.rows = rows;
  limits.in_features = in_features;
  return limits;
}

// A backend with its workspace.
class TestBackend {
 public:
  TestBackend(const Kernels& kernels, int threads, const WorkspaceLimits& limits)
      : backend_(make_cpu_backend(threads, &kernels)) {
    Arena plan;
    backend_->layout(plan, limits);
    bytes_ = plan.used_bytes();
    Arena arena(backend_->allocate(bytes_), bytes_);
    backend_->layout(arena, limits);
  }
  Backend* operator->() const { return backend_.get(); }
  Backend& operator*() const { return *backend_; }

 private:
  std::unique_ptr<Backend> backend_;
  size_t bytes_ = 0;
};

using test::Random;

// A row-major fp32 matrix with room behind each row, so that strides are tested too.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t cols, int64_t gap = 0)
      : rows_(rows),
        cols_(cols),
        stride_(cols + gap),
        data_(static_cast<size_t>(rows * (cols + gap)) + 1, 0.0f) {}
  Matrix(int64_t rows, int64_t cols, Random& random, float scale = 1.0f, int64_t gap = 0)
      : Matrix(rows, cols, gap) {
    for (float& value : data_) value = random.normal(scale);
  }
  Tensor tensor() { return {data_.data(), DType::kF32, rows_, cols_, stride_}; }
  float* row(int64_t r) { return data_.data() + r * stride_; }
  const float* row(int64_t r) const { return data_.data() + r * stride_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

 private:
  int64_t rows_, cols_, stride_;
  std::vector<float> data_;
};

inline bool equal_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

// The KV caches of an instruction set: in fp32, and in bf16 where it has kernels for that.
inline std::vector<std::pair<const Kernels*, DType>> all_kv_caches() {
  std::vector<std::pair<const Kernels*, DType>> result;
  for (const Kernels* kernels : all_kernels()) {
    result.emplace_back(kernels, DType::kF32);
    if (kernels->bf16_attention != nullptr) result.emplace_back(kernels, DType::kBF16);
  }
  return result;
}

// Keys and values of random tokens, and the same as the CPU backend keeps them (kv_layout.h).
class TestKv {
 public:
  TestKv(int64_t heads, int64_t slots, int64_t head_dim, Random& random)
      : heads_(heads),
        slots_((slots + kKvBlock - 1) / kKvBlock * kKvBlock),
        head_dim_(head_dim),
        keys_(heads * slots_, head_dim, random, 0.7f),
        values_(heads * slots_, head_dim, random) {}
  float* key(int64_t head, int64_t slot) { return keys_.row(head * slots_ + slot); }
  float* value(int64_t head, int64_t slot) { return values_.row(head * slots_ + slot); }
  int64_t heads() const { return heads_; }
  int64_t slots() const { return slots_; }
  void copy_slot(int64_t from, int64_t to) {
    for (int64_t h = 0; h < heads_; ++h) {
      std::copy_n(key(h, from), head_dim_, key(h, to));
      std::copy_n(value(h, from), head_dim_, value(h, to));
    }
  }
  KvLayer pack(const Backend& backend, DType dtype) {
    dtype_ = dtype;
    KvLayer layer{nullptr, nullptr, dtype, heads_, slots_, head_dim_};
    for (std::vector<char>& packed : packed_) packed.assign(backend.kv_bytes(layer), 0);
    move(true);
    layer.keys = packed_[0].data();
    layer.values = packed_[1].data();
    return layer;
  }
  // What an op has written to the layer.
  void unpack() { move(false); }

 private:
  void move(bool pack) {
    if (dtype_ == DType::kBF16) {
      move_as<PairedKv>(pack);
    } else {
      move_as<PlainKv>(pack);
    }
  }
  template <typename Layout>
  void move_as(bool pack) {
    using Element = typename Layout::Element;
    std::vector<Element> row(static_cast<size_t>(head_dim_));
    const auto move_row = [&](float* plain, Element* packed, const auto& place) {
      if (pack) convert(row.data(), dtype_, plain, DType::kF32, head_dim_);
      for (int64_t d = 0; d < head_dim_; ++d) {
        Element& there = packed[place(d)];
        Element& here = row[static_cast<size_t>(d)];
        (pack ? there : here) = pack ? here : there;
      }
      if (!pack) convert(plain, DType::kF32, row.data(), dtype_, head_dim_);
    };
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t first = h * Layout::head_elements(slots_, head_dim_);
      for (int64_t slot = 0; slot < slots_; ++slot) {
        move_row(key(h, slot), reinterpret_cast<Element*>(packed_[0].data()) + first,
                 [&](int64_t d) { return Layout::key(head_dim_, slot, d); });
        move_row(value(h, slot), reinterpret_cast<Element*>(packed_[1].data()) + first,
                 [&](int64_t d) { return Layout::value(head_dim_, slot, d); });
      }
    }
  }

  int64_t heads_, slots_, head_dim_;
  Matrix keys_, values_;
  DType dtype_ = DType::kF32;
  std::vector<char> packed_[2];  // keys, values
};

// A packed weight, with the values that it holds (rounded to its type) in fp32.
class TestWeight {
 public:
  TestWeight(Backend& backend, DType dtype, const Matrix& values, const float* bias = nullptr)
      : rounded_(values.rows(), values.cols()),
        memory_(backend.linear_bytes(dtype, values.rows(), values.cols()) / 4 + 32, 0),
        source_(static_cast<size_t>(values.rows() * values.cols())) {
    // 64-byte aligned, as in the arena.
    auto address = reinterpret_cast<uintptr_t>(memory_.data());
    address = (address + 127) / 128 * 128;
    weight_ = {reinterpret_cast<void*>(address), dtype, values.rows(), values.cols(), bias};
    for (int64_t r = 0; r < values.rows(); ++r) {
      char* to = reinterpret_cast<char*>(source_.data()) +
                 static_cast<size_t>(r * values.cols()) * dtype_size(dtype);
      convert(to, dtype, values.row(r), DType::kF32, values.cols());
      convert(rounded_.row(r), DType::kF32, to, dtype, values.cols());
    }
    backend.load_linear(weight_, 0, source());
  }
  Tensor source() {
    return {source_.data(), weight_.dtype, rounded_.rows(), rounded_.cols(), rounded_.cols()};
  }
  const LinearWeight& weight() const { return weight_; }
  const Matrix& values() const { return rounded_; }

 private:
  Matrix rounded_;
  std::vector<uint32_t> memory_;
  std::vector<uint32_t> source_;
  LinearWeight weight_;
};

}  // namespace frspec::cpu
