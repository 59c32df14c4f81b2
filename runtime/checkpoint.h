// The tensors of a model folder, whichever of its safetensors files holds them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "safetensors.h"
#include "tensor.h"

namespace frspec {

class Checkpoint {
 public:
  // Opens `folder`: model.safetensors, else model.safetensors.index.json and its shards, else the
  // only *.safetensors file. Checks every header; reads no tensor. ModelError names what is
  // missing.
  explicit Checkpoint(const std::string& folder);

  const std::string& folder() const { return folder_; }
  bool contains(const std::string& name) const { return tensors_.count(name) != 0; }
  std::vector<std::string> names() const;  // ascending

  // ModelError when the tensor is missing, has another shape, or is not fp32, fp16 or bf16. The
  // reference stays valid as long as the checkpoint.
  const HostTensor& tensor(const std::string& name, const std::vector<int64_t>& expected_shape);
  // The same for any shape: for checkpoints that decide a size themselves.
  const HostTensor& tensor(const std::string& name);

  // Drops the tensor's mapped pages once they were copied, so that a loader never holds a whole
  // file's pages next to the copy.
  void release(const HostTensor& tensor) { release(tensor, tensor.bytes); }
  // The same of its first bytes, for a tensor that is copied piece by piece.
  void release(const HostTensor& tensor, size_t bytes);

  // ModelError for a tensor whose name begins with `prefix` that was not asked for: the model is
  // another one than its configuration says. `described`: what it is not part of, for the message.
  void check_all_used(const std::string& prefix, const std::string& described) const;

  // A view: 2-D [rows, cols] as it is, 1-D [n] as [1, n]. ModelError for other ranks.
  static Tensor as_matrix(const HostTensor& tensor);

 private:
  void open_index(const std::string& index_path);
  const SafetensorsFile& open_file(const std::string& path);

  std::string folder_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, const SafetensorsFile*> tensors_;  // name -> file
  std::map<std::string, HostTensor> resolved_;
};

}  // namespace frspec
