#include "weights.h"

namespace frspec {

float* WeightReader::vector(const std::string& name, int64_t size) {
  const HostTensor& source = checkpoint_.tensor(name, {size});
  float* destination = arena_.take_array<float>(plan_name_, static_cast<size_t>(size));
  if (!arena_.planning()) {
    backend_.load_vector(destination, Checkpoint::as_matrix(source));
    checkpoint_.release(source);
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
  int64_t first_row = 0;
  for (const Part& part : parts) {
    const HostTensor& source = checkpoint_.tensor(part.name + ".weight", {part.rows, in_features});
    const HostTensor* bias_source =
        with_bias ? &checkpoint_.tensor(part.name + ".bias", {part.rows}) : nullptr;
    if (!arena_.planning()) {
      backend_.load_linear(weight, first_row, Checkpoint::as_matrix(source));
      checkpoint_.release(source);
      if (bias_source != nullptr) {
        backend_.load_vector(bias + first_row, Checkpoint::as_matrix(*bias_source));
        checkpoint_.release(*bias_source);
      }
    }
    first_row += part.rows;
  }
  return weight;
}

}  // namespace frspec
