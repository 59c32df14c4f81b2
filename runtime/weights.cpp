#include "weights.h"

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

}  // namespace frspec
