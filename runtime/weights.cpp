#include "weights.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "json_file.h"

namespace frspec {
namespace {

template <typename Bits>
bool has_exponent(const Tensor& vector, Bits exponent) {
  const auto* bits = static_cast<const Bits*>(vector.data);
  return std::any_of(bits, bits + vector.cols,
                     [&](Bits each) { return (each & exponent) == exponent; });
}

// Whether a vector holds neither NaN nor infinity: numbers with all bits of the exponent set.
bool is_finite(const Tensor& vector) {
  switch (vector.dtype) {
    case DType::kF32:
      return !has_exponent<uint32_t>(vector, 0x7f800000);
    case DType::kBF16:
      return !has_exponent<uint16_t>(vector, 0x7f80);
    default:
      return !has_exponent<uint16_t>(vector, 0x7c00);  // fp16
  }
}

}  // namespace

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
    FRSPEC_CHECK(is_finite(Checkpoint::as_matrix(source)), ModelError, source.file->path(),
                 ": tensor ", quote(name), ": expected finite numbers, found NaN or infinity");
    backend_.load_vector(destination, Checkpoint::as_matrix(source));
    checkpoint_->release(source);
  }
  return destination;
}

void WeightReader::load_rows(const LinearWeight& weight, int64_t first_row,
                             const HostTensor& source) {
  constexpr int64_t kLeastBytes = 2 << 20;
  const Tensor matrix = Checkpoint::as_matrix(source);
  const int64_t row_bytes = matrix.cols * static_cast<int64_t>(dtype_size(matrix.dtype));
  // Small beside the model, and enough for the threads of a CPU to share.
  const int64_t bytes = std::max(kLeastBytes, matrix.rows * row_bytes / 16);
  const int64_t block = std::max<int64_t>(bytes / row_bytes / 64, 1) * 64;
  for (int64_t row = 0; row < matrix.rows; row += block) {
    const int64_t rows = std::min(block, matrix.rows - row);
    backend_.load_linear(weight, first_row + row, matrix.row_slice(row, rows));
    checkpoint_->release(source, static_cast<size_t>((row + rows) * row_bytes));
  }
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
      load_rows(weight, first_row, source);
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
    checkpoint_->release(source);  // its pages are mapped by sixteen and more at a time
  }
  return weight;
}

}  // namespace frspec
