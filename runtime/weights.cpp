#include "weights.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace frspec {

void WeightReader::fill_vector(float* destination, int64_t size, float value) {
  std::vector<float> values(static_cast<size_t>(size), value);
  backend_.load_vector(destination, {values.data(), DType::kF32, 1, size, size});
}

float* WeightReader::vector(const std::string& name, int64_t size) {
  float* destination = arena_.take_array<float>(plan_name_, static_cast<size_t>(size));
  if (checkpoint_ == nullptr) {
    if (!arena_.planning()) fill_vector(destination, size, 1.0f);
    return destination;
  }
  const HostTensor& source = checkpoint_->tensor(name, {size});
  if (!arena_.planning()) {
    backend_.load_vector(destination, Checkpoint::as_matrix(source));
    checkpoint_->release(source);
  }
  return destination;
}

LinearWeight WeightReader::linear(const std::vector<Part>& parts, int64_t in_features,
                                  bool with_bias) {
  LinearWeight weight;
  weight.dtype = dtype_;
  weight.in_features = in_features;
  for (const Part& part : parts) weight.out_features += part.rows;
  weight.data =
      arena_.take(plan_name_, backend_.linear_bytes(dtype_, weight.out_features, in_features));
  float* bias = nullptr;
  if (with_bias) {
    bias = arena_.take_array<float>(plan_name_, static_cast<size_t>(weight.out_features));
    weight.bias = bias;
  }
  if (checkpoint_ == nullptr) {
    if (!arena_.planning()) {
      backend_.fill_linear(weight, seed_ ^ std::hash<std::string>{}(parts.front().name));
      if (bias != nullptr) fill_vector(bias, weight.out_features, 0.0f);
    }
    return weight;
  }
  int64_t first_row = 0;
  for (const Part& part : parts) {
    const HostTensor& source = checkpoint_->tensor(part.name + ".weight", {part.rows, in_features});
    const HostTensor* bias_source =
        with_bias ? &checkpoint_->tensor(part.name + ".bias", {part.rows}) : nullptr;
    if (!arena_.planning()) {
      backend_.load_linear(weight, first_row, Checkpoint::as_matrix(source));
      checkpoint_->release(source);
      if (bias_source != nullptr) {
        backend_.load_vector(bias + first_row, Checkpoint::as_matrix(*bias_source));
        checkpoint_->release(*bias_source);
      }
    }
    first_row += part.rows;
  }
  return weight;
}

LinearWeight WeightReader::chosen_rows(const std::string& name, int64_t rows, int64_t in_features,
                                       const std::vector<int32_t>& chosen) {
  constexpr int64_t kRows = 256;  // gathered at a time
  const auto count = static_cast<int64_t>(chosen.size());
  if (checkpoint_ == nullptr) return linear({{name, count}}, in_features, false);
  LinearWeight weight;
  weight.dtype = dtype_;
  weight.out_features = count;
  weight.in_features = in_features;
  weight.data = arena_.take(plan_name_, backend_.linear_bytes(dtype_, count, in_features));
  const HostTensor& source = checkpoint_->tensor(name + ".weight", {rows, in_features});
  if (arena_.planning()) return weight;
  const Tensor matrix = Checkpoint::as_matrix(source);
  const size_t row_bytes = static_cast<size_t>(in_features) * dtype_size(matrix.dtype);
  std::vector<char> gathered(static_cast<size_t>(kRows) * row_bytes);
  for (int64_t first = 0; first < count; first += kRows) {
    const int64_t n = std::min(kRows, count - first);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = chosen[static_cast<size_t>(first + i)];
      std::memcpy(gathered.data() + static_cast<size_t>(i) * row_bytes,
                  matrix.row_slice(row, 1).data, row_bytes);
    }
    backend_.load_linear(weight, first,
                         {gathered.data(), matrix.dtype, n, in_features, in_features});
  }
  checkpoint_->release(source);
  return weight;
}

}  // namespace frspec
