// The products of a decoding step: the backend's own, cuBLAS, and the backend's kernel where the
// parts of k are chosen freely for the number of rows, which invariant rows forbid.
#include <algorithm>

#include "bench.h"
#include "cublas_handle.h"
#include "handles.h"
#include "kernels.h"
#include "memory.h"

namespace frspec::cuda::bench {
namespace {

constexpr DType kType = DType::kBF16;
constexpr int kFreeParts[] = {1, 2, 4, 8};

struct Shape {
  const char* name;
  int64_t out, in;
  bool swiglu = false;  // gate and up of `out` rows each
  bool logits = false;  // fp32 outputs

  size_t bytes() const { return static_cast<size_t>((swiglu ? 2 : 1) * out * in) * 2; }
};

std::vector<Shape> shapes_of(const Bench& bench) {
  const ModelConfig& c = bench.target;
  const int64_t q = c.num_heads * c.head_dim;
  const int64_t kv = c.num_kv_heads * c.head_dim;
  return {{"qkv", q + 2 * kv, c.hidden_size},
          {"o", c.hidden_size, q},
          {"gate and up", c.intermediate_size, c.hidden_size, true},
          {"down", c.hidden_size, c.intermediate_size},
          {"fc", c.hidden_size, 2 * c.hidden_size},
          {"sub-vocabulary head", std::min(bench.settings.sub_vocab, c.vocab_size), c.hidden_size,
           false, true},
          {"head", c.vocab_size, c.hidden_size, false, true}};
}

class LinearBench {
 public:
  explicit LinearBench(Bench& bench)
      : bench_(bench), backend_(bench.make_backend()), shapes_(shapes_of(bench)) {
    Arena planning;
    layout(planning);
    const size_t bytes = planning.used_bytes();
    Arena arena(backend_->allocate(bytes), bytes);
    layout(arena);
    uint64_t seed = 1;
    fill_random(*backend_, x_, seed);
    for (const auto& copies : weights_) {
      for (const LinearWeight& weight : copies) backend_->fill_linear(weight, ++seed);
    }
    backend_->end_load();
    cublas_ = std::make_unique<CublasHandle>(stream_, cublas_workspace_);
  }

  json run() {
    json rows = json::array();
    for (size_t i = 0; i < shapes_.size(); ++i) {
      bench_.bandwidths.push_back(backend_->measure_bandwidth());
      for (const int64_t n : bench_.settings.rows) rows.push_back(measure(shapes_[i], i, n));
    }
    return rows;
  }

 private:
  void layout(Arena& arena) {
    const auto& rows = bench_.settings.rows;
    most_rows_ = *std::max_element(rows.begin(), rows.end());
    backend_->layout(arena, bench_.limits(most_rows_, 1));
    weights_.clear();
    int64_t widest_in = 0;
    int64_t widest_out = 0;
    size_t scratch_floats = 0;
    for (const Shape& shape : shapes_) {
      std::vector<LinearWeight> copies(static_cast<size_t>(bench_.copies(shape.bytes())));
      const int64_t outputs = shape.swiglu ? 2 * shape.out : shape.out;
      for (LinearWeight& copy : copies) {
        copy = {arena.take("weights", shape.bytes()), kType, outputs, shape.in, nullptr};
      }
      weights_.push_back(copies);
      widest_in = std::max(widest_in, shape.in);
      widest_out = std::max(widest_out, outputs);
      for (const int parts : kFreeParts) {
        scratch_floats = std::max(
            scratch_floats,
            linear_scratch(most_rows_, shape.out, shape.swiglu, split_in_parts(shape.in, parts)));
      }
    }
    x_ = arena.take_tensor("activations", kType, most_rows_, widest_in);
    out_ = arena.take_tensor("activations", DType::kF32, most_rows_, widest_out);
    scratch_ = {arena.take_array<float>("scratch", scratch_floats), scratch_floats};
    cublas_workspace_ = arena.take("scratch", kCublasWorkspaceBytes);
  }

  static LinearWeight gate_of(const Shape& shape, LinearWeight both) {
    both.out_features = shape.out;
    return both;
  }
  static LinearWeight up_of(const Shape& shape, LinearWeight both) {
    both.out_features = shape.out;
    both.data = static_cast<char*>(both.data) + shape.bytes() / 2;
    return both;
  }

  Tensor out_of(const Shape& shape, int64_t n, int64_t cols) const {
    return {out_.data, shape.logits ? DType::kF32 : kType, n, cols, cols};
  }

  json measure(const Shape& shape, size_t index, int64_t n) {
    const std::vector<LinearWeight>& copies = weights_[index];
    const Tensor x = view(x_, n, shape.in);
    const Tensor out = out_of(shape, n, shape.out);
    std::vector<Sample> samples;
    samples.push_back(sample_backend(*backend_, [&] {
      for (const LinearWeight& copy : copies) {
        if (shape.swiglu) {
          backend_->linear_swiglu(out, x, gate_of(shape, copy), up_of(shape, copy));
        } else {
          backend_->linear(out, x, copy);
        }
      }
    }));
    samples.push_back(sample_stream(stream_, [&] {
      // Gate and up in one product; the SiLU that would follow is not counted.
      const Tensor product = out_of(shape, n, copies.front().out_features);
      for (const LinearWeight& copy : copies) cublas_->multiply(product, x, copy.data, 0.0f);
    }));
    for (const int parts : kFreeParts) {
      samples.push_back(sample_stream(stream_, [&] {
        for (const LinearWeight& copy : copies) {
          const LinearWeight gate = gate_of(shape, copy);
          const LinearWeight up = up_of(shape, copy);
          linear(out, x, gate, shape.swiglu ? &up : nullptr, nullptr,
                 split_in_parts(shape.in, parts), scratch_, stream_);
        }
      }));
    }
    std::vector<double> us = medians(samples, bench_.settings.repeats);
    for (double& each : us) each *= 1e6 / static_cast<double>(copies.size());
    const auto fastest = std::min_element(us.begin() + 2, us.end());
    return {
        {"op", shape.name},
        {"out", shape.out},
        {"in", shape.in},
        {"rows", n},
        {"copies", copies.size()},
        {"bytes", shape.bytes()},
        {"us", us[0]},
        {"cublas_us", us[1]},
        {"free_us", *fastest},
        {"free_parts", kFreeParts[fastest - us.begin() - 2]},
        {"parts", split_linear(shape.out, shape.in, shape.swiglu, bench_.multiprocessors).parts}};
  }

  Bench& bench_;
  std::unique_ptr<Backend> backend_;
  std::vector<Shape> shapes_;
  Stream stream_;
  int64_t most_rows_ = 0;
  std::vector<std::vector<LinearWeight>> weights_;  // [shape][copy]; gate above up
  Tensor x_, out_;
  LinearScratch scratch_{};
  void* cublas_workspace_ = nullptr;
  std::unique_ptr<CublasHandle> cublas_;
};

}  // namespace

json measure_linears(Bench& bench) { return LinearBench(bench).run(); }

}  // namespace frspec::cuda::bench
