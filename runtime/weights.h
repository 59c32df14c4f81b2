// Reads the weights of a network from a checkpoint into the arena, or makes random ones.
//
// One description serves both passes of the layout (arena.h): over a planning arena every tensor is
// looked up and its shape checked, but no byte of it is read; over real memory each tensor is read
// once from the mapped file into the backend's layout, and its file pages are given back.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "arena.h"
#include "backend.h"
#include "checkpoint.h"

namespace frspec {

class WeightReader {
 public:
  // plan_name: the line of the memory plan that these weights are counted under. checkpoint: null
  // for random weights from the seed.
  WeightReader(Backend& backend, Arena& arena, Checkpoint* checkpoint, std::optional<uint64_t> seed,
               DType dtype, const char* plan_name)
      : backend_(backend),
        arena_(arena),
        checkpoint_(checkpoint),
        seed_(seed.value_or(0)),
        dtype_(dtype),
        plan_name_(plan_name) {}

  // fp32 copy of a vector [size].
  float* vector(const std::string& name, int64_t size);

  struct Part {
    std::string name;  // without ".weight" and ".bias"
    int64_t rows;
  };
  // The parts [rows, in_features], stacked in order. with_bias: every part has a "<name>.bias"
  // [rows].
  LinearWeight linear(const std::vector<Part>& parts, int64_t in_features, bool with_bias);

  // The rows `chosen` of the matrix [rows, in_features], in that order: only they take memory.
  LinearWeight chosen_rows(const std::string& name, int64_t rows, int64_t in_features,
                           const std::vector<int32_t>& chosen);

  bool contains(const std::string& name) const {
    return checkpoint_ != nullptr && checkpoint_->contains(name);
  }

 private:
  // A whole tensor from row first_row on, its file's pages given back block by block.
  void load_rows(const LinearWeight& weight, int64_t first_row, const HostTensor& source);
  // A vector of random weights: ones for norms, zeros for biases.
  void fill_vector(float* destination, int64_t size, float value);

  Backend& backend_;
  Arena& arena_;
  Checkpoint* checkpoint_;
  uint64_t seed_;
  DType dtype_;
  const char* plan_name_;
};

}  // namespace frspec
