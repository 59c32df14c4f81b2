#include "checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>
#include <system_error>

#include "check.h"
#include "json_file.h"

namespace frspec {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr size_t kMaxIndexBytes = 100'000'000;

// What to say of a folder without safetensors files: the formats that can be converted.
std::string conversion_hint(const std::string& folder) {
  std::error_code failure;
  std::string found;
  for (const auto& item : fs::directory_iterator(folder, failure)) {
    const std::string extension = item.path().extension().string();
    const bool convertible =
        extension == ".bin" || extension == ".pt" || extension == ".pth" || extension == ".gguf";
    const std::string name = item.path().filename().string();
    // The alphabetically first, so that the message does not depend on the directory's order.
    if (convertible && (found.empty() || name < found)) found = name;
  }
  if (found.empty()) return "found none";
  const std::string source =
      fs::path(found).extension() == ".gguf" ? (fs::path(folder) / found).string() : folder;
  return concat("found only ", found, "; convert it first: frspec convert ", source, " OUT");
}

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

// "; nearest: ..." when a name of the checkpoint resembles `wanted`, else nothing.
std::string nearest_name(const std::string& wanted,
                         const std::map<std::string, const SafetensorsFile*>& tensors) {
  constexpr size_t kMaxNames = 10000;
  constexpr size_t kMaxLength = 200;
  size_t best = wanted.size() / 3 + 1;
  std::string nearest;
  size_t seen = 0;
  for (const auto& item : tensors) {
    if (++seen > kMaxNames) break;
    if (item.first.size() > kMaxLength) continue;
    const size_t distance = edit_distance(wanted, item.first);
    if (distance < best) {
      best = distance;
      nearest = item.first;
    }
  }
  return nearest.empty() ? "" : "; nearest: " + quote(nearest);
}

}  // namespace

Checkpoint::Checkpoint(const std::string& folder) : folder_(folder) {
  std::error_code failure;
  const fs::file_status status = fs::status(folder, failure);
  FRSPEC_CHECK(fs::exists(status), ModelError, folder, ": expected a model folder, found nothing");
  if (!fs::is_directory(status)) {
    const std::string extension = fs::path(folder).extension().string();
    const bool convertible = extension == ".gguf" || extension == ".bin" || extension == ".pt";
    throw ModelError(concat(
        folder, ": expected a model folder, found a file",
        convertible ? "; convert it first: frspec convert " + folder + " OUT" : std::string()));
  }
  const fs::path root(folder);
  const fs::path single = root / "model.safetensors";
  const fs::path index = root / "model.safetensors.index.json";
  if (fs::exists(single, failure)) {
    const SafetensorsFile& file = open_file(single.string());
    for (const std::string& name : file.names()) tensors_[name] = &file;
  } else if (fs::exists(index, failure)) {
    open_index(index.string());
  } else {
    std::vector<std::string> candidates;
    for (const auto& item : fs::directory_iterator(root, failure)) {
      if (item.path().extension() == ".safetensors") candidates.push_back(item.path().string());
    }
    FRSPEC_CHECK(!failure, ModelError, folder, ": cannot be listed: ", failure.message());
    FRSPEC_CHECK(!candidates.empty(), ModelError, folder,
                 ": expected model.safetensors or model.safetensors.index.json, ",
                 conversion_hint(folder));
    FRSPEC_CHECK(candidates.size() == 1, ModelError, folder,
                 ": expected model.safetensors, model.safetensors.index.json or one *.safetensors "
                 "file, found ",
                 candidates.size(), " *.safetensors files and no index");
    const SafetensorsFile& file = open_file(candidates.front());
    for (const std::string& name : file.names()) tensors_[name] = &file;
  }
}

void Checkpoint::open_index(const std::string& index_path) {
  const json index = read_json_object(index_path, kMaxIndexBytes);
  const auto found = index.find("weight_map");
  FRSPEC_CHECK(found != index.end() && found->is_object(), ModelError, index_path,
               ": weight_map: expected an object, found ",
               found == index.end() ? "none" : describe(*found));
  FRSPEC_CHECK(!found->empty(), ModelError, index_path,
               ": weight_map: expected at least one tensor, found none");
  std::map<std::string, const SafetensorsFile*> shards;
  for (const auto& [name, shard] : found->items()) {
    FRSPEC_CHECK(shard.is_string(), ModelError, index_path, ": weight_map: tensor ", quote(name),
                 ": expected a file name, found ", describe(shard));
    const auto& file_name = shard.get_ref<const std::string&>();
    // An index may not reach outside its folder.
    FRSPEC_CHECK(!file_name.empty() && file_name != "." && file_name != ".." &&
                     file_name.find('/') == std::string::npos &&
                     file_name.find('\0') == std::string::npos,
                 ModelError, index_path, ": weight_map: tensor ", quote(name),
                 ": expected the name of a file in the same folder, found ", quote(file_name));
    const SafetensorsFile*& file = shards[file_name];
    if (file == nullptr) {
      const std::string path = (fs::path(folder_) / file_name).string();
      std::error_code failure;
      FRSPEC_CHECK(fs::exists(path, failure), ModelError, index_path, ": tensor ", quote(name),
                   ": expected the shard ", quote(file_name), " in the folder, found none");
      file = &open_file(path);
    }
    FRSPEC_CHECK(file->contains(name), ModelError, index_path, ": tensor ", quote(name),
                 ": expected it in the shard ", quote(file_name), ", found none");
    tensors_[name] = file;
  }
}

const SafetensorsFile& Checkpoint::open_file(const std::string& path) {
  files_.push_back(std::make_unique<SafetensorsFile>(path));
  return *files_.back();
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& item : tensors_) names.push_back(item.first);
  return names;
}

const HostTensor& Checkpoint::tensor(const std::string& name) {
  const auto resolved = resolved_.find(name);
  if (resolved != resolved_.end()) return resolved->second;
  const auto found = tensors_.find(name);
  FRSPEC_CHECK(found != tensors_.end(), ModelError, folder_, ": expected tensor ", quote(name),
               ", found none", nearest_name(name, tensors_));
  HostTensor tensor = found->second->tensor(name);
  FRSPEC_CHECK(
      tensor.dtype == DType::kF32 || tensor.dtype == DType::kF16 || tensor.dtype == DType::kBF16,
      ModelError, tensor.file->path(), ": tensor ", quote(name),
      ": expected fp32, fp16 or bf16, found ", dtype_name(tensor.dtype));
  return resolved_.emplace(name, std::move(tensor)).first->second;
}

const HostTensor& Checkpoint::tensor(const std::string& name,
                                     const std::vector<int64_t>& expected_shape) {
  const HostTensor& found = tensor(name);
  FRSPEC_CHECK(found.shape == expected_shape, ModelError, found.file->path(), ": tensor ",
               quote(name), ": expected shape ", shape_text(expected_shape), ", found ",
               shape_text(found.shape));
  return found;
}

void Checkpoint::release(const HostTensor& tensor, size_t bytes) {
  tensor.file->release(tensor, bytes);
}

void Checkpoint::check_all_used(const std::string& prefix, const std::string& described) const {
  for (const auto& item : tensors_) {
    const std::string& name = item.first;
    // Tables of the rotary embedding, which old checkpoints store, follow from the configuration.
    const bool is_table = name.find(".rotary_emb.") != std::string::npos;
    if (!name.starts_with(prefix) || is_table) continue;
    FRSPEC_CHECK(resolved_.count(name) != 0, ModelError, item.second->path(), ": tensor ",
                 quote(name), " is no part of ", described);
  }
}

Tensor Checkpoint::as_matrix(const HostTensor& tensor) {
  FRSPEC_CHECK(tensor.shape.size() == 1 || tensor.shape.size() == 2, ModelError,
               tensor.file->path(), ": tensor ", quote(tensor.name),
               ": expected one or two dimensions, found shape ", shape_text(tensor.shape));
  const int64_t rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1;
  const int64_t cols = tensor.shape.back();
  // Tensor has no const twin; nothing writes through a view of a file (it is mapped read-only).
  return {const_cast<void*>(tensor.data), tensor.dtype, rows, cols, cols};
}

}  // namespace frspec
