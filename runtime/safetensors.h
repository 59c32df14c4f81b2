// One mapped safetensors file: its checked header and views of its tensors.
//
// Layout of the format: u64 little-endian header length, a JSON header, then the tensors' bytes
// without holes. Nothing is read but the header until a tensor's bytes are touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tensor.h"

namespace frspec {

class SafetensorsFile;

// A tensor in a mapped file. `data` is aligned to the size of an element and lives as long as
// `file`.
struct HostTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const void* data = nullptr;
  size_t bytes = 0;
  const SafetensorsFile* file = nullptr;
};

class SafetensorsFile {
 public:
  // Maps the file and checks its whole header. ModelError names the file, the tensor, what was
  // expected and what was found. The file must not shrink while it is mapped.
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  std::vector<std::string> names() const;  // ascending
  bool contains(const std::string& name) const;

  // ModelError when the tensor is absent, has a dtype that no DType represents (an FP8 tensor,
  // say), or starts at an offset that is not a multiple of its element size (the format allows
  // that, but its writers pad the header and sort tensors by element size, so it does not occur in
  // practice).
  HostTensor tensor(const std::string& name) const;

  // Drops the pages of the tensor's first `bytes`, and those around them, from memory; they are
  // read again if touched.
  void release(const HostTensor& tensor, size_t bytes) const;

 private:
  struct Entry {
    std::string format_dtype;  // as the header spells it, e.g. "BF16"
    std::vector<int64_t> shape;
    uint64_t begin = 0;  // bytes from the start of the file
    uint64_t end = 0;
  };

  void parse_header();
  // ModelError unless the tensors tile the data: no overlap, no hole, nothing after them.
  void check_tiling(uint64_t data_begin) const;
  void unmap() noexcept;

  std::string path_;
  const unsigned char* base_ = nullptr;
  size_t size_ = 0;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, Entry> entries_;
};

// "[2, 3]", for messages.
std::string shape_text(const std::vector<int64_t>& shape);

}  // namespace frspec
