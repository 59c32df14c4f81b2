#include "checkpoint.h"

#include <doctest/doctest.h>

#include <cstring>

#include "check.h"
#include "file_fixtures.h"

using namespace frspec;        // NOLINT
using namespace frspec::test;  // NOLINT

namespace {

FileTensor fp32(const std::string& name, std::vector<int64_t> shape) {
  int64_t size = 1;
  for (const int64_t extent : shape) size *= extent;
  return {name, "F32", std::move(shape), std::string(static_cast<size_t>(size) * 4, '\1')};
}

std::string folder_error(const TempFolder& folder) {
  return error_message<ModelError>([&] { Checkpoint checkpoint(folder.path()); });
}

std::string index_text(const std::string& weight_map) {
  return R"({"metadata":{"total_size":1},"weight_map":)" + weight_map + "}";
}

}  // namespace

TEST_CASE("checkpoint: a single file") {
  const TempFolder folder;
  folder.write("model.safetensors",
               safetensors_bytes({fp32("layers.0.q_proj.weight", {2, 3}),
                                  fp32("norm.weight", {3}),
                                  fp32("cube", {1, 2, 3}),
                                  fp32("scalar", {}),
                                  {"ids", "I64", {1}, bytes_of<int64_t>({1})}}));
  folder.write("model.safetensors.index.json", "not read when the single file exists");
  Checkpoint checkpoint(folder.path());
  CHECK(checkpoint.contains("norm.weight"));
  CHECK_FALSE(checkpoint.contains("lm_head.weight"));
  CHECK(checkpoint.names().size() == 5);

  const HostTensor& q = checkpoint.tensor("layers.0.q_proj.weight", {2, 3});
  CHECK(&q == &checkpoint.tensor("layers.0.q_proj.weight"));
  const Tensor matrix = Checkpoint::as_matrix(q);
  CHECK(matrix.data == q.data);
  CHECK(matrix.dtype == DType::kF32);
  CHECK(matrix.rows == 2);
  CHECK(matrix.cols == 3);
  CHECK(matrix.stride == 3);
  const Tensor vector = Checkpoint::as_matrix(checkpoint.tensor("norm.weight", {3}));
  CHECK(vector.rows == 1);
  CHECK(vector.cols == 3);
  checkpoint.release(q);
  CHECK(static_cast<const char*>(q.data)[0] == '\1');

  const std::string file = folder.path("model.safetensors");
  for (const char* name : {"cube", "scalar"}) {
    check_names(error_message<ModelError>([&] { Checkpoint::as_matrix(checkpoint.tensor(name)); }),
                {file, name, "one or two dimensions"});
  }
  check_names(error_message<ModelError>([&] {
                checkpoint.tensor("layers.0.q_proj.weight", {3, 2});
              }),
              {file, "layers.0.q_proj.weight", "expected shape [3, 2]", "found [2, 3]"});
  check_names(error_message<ModelError>([&] {
                checkpoint.tensor("norm.weight", {3, 1});
              }),
              {"expected shape [3, 1]", "found [3]"});
  check_names(error_message<ModelError>([&] { checkpoint.tensor("ids", {1}); }),
              {file, "ids", "expected fp32, fp16 or bf16", "found int64"});
  check_names(error_message<ModelError>([&] {
                checkpoint.tensor("layers.0.k_proj.weight", {2, 3});
              }),
              {folder.path(), "\"layers.0.k_proj.weight\"", "found none",
               "nearest: \"layers.0.q_proj.weight\""});
  const std::string far = error_message<ModelError>([&] { checkpoint.tensor("lm_head", {2}); });
  CHECK(far.find("nearest") == std::string::npos);
}

TEST_CASE("checkpoint: shards with an index") {
  const TempFolder folder;
  folder.write("a.safetensors", safetensors_bytes({fp32("x", {1}), fp32("unlisted", {1})}));
  folder.write("b.safetensors", safetensors_bytes({fp32("y", {2})}));
  folder.write("model.safetensors.index.json",
               index_text(R"({"x":"a.safetensors","y":"b.safetensors"})"));
  Checkpoint checkpoint(folder.path());
  CHECK(checkpoint.names() == std::vector<std::string>{"x", "y"});
  CHECK(checkpoint.tensor("x", {1}).file->path() == folder.path("a.safetensors"));
  CHECK(checkpoint.tensor("y", {2}).file->path() == folder.path("b.safetensors"));
}

TEST_CASE("checkpoint: any one safetensors file will do") {
  const TempFolder folder;
  folder.write("pytorch_model.bin", "");
  folder.write("weights.safetensors", safetensors_bytes({fp32("x", {1})}));
  CHECK(Checkpoint(folder.path()).contains("x"));
  folder.write("other.safetensors", safetensors_bytes({fp32("y", {1})}));
  check_names(folder_error(folder), {folder.path(), "found 2 *.safetensors files and no index"});
}

TEST_CASE("checkpoint: folders that hold no safetensors") {
  check_names(error_message<ModelError>([] { Checkpoint("/nonexistent/model"); }),
              {"/nonexistent/model", "expected a model folder", "found nothing"});
  const TempFolder folder;
  check_names(folder_error(folder), {folder.path(), "expected model.safetensors", "found none"});
  folder.write("pytorch_model.bin", "x");
  check_names(folder_error(folder),
              {"found only pytorch_model.bin", "frspec convert " + folder.path() + " OUT"});
  const TempFolder gguf_folder;
  const std::string gguf = gguf_folder.write("m.gguf", "x");
  check_names(folder_error(gguf_folder), {"found only m.gguf", "frspec convert " + gguf + " OUT"});
  check_names(error_message<ModelError>([&] { Checkpoint checkpoint(gguf); }),
              {"expected a model folder", "found a file", "frspec convert " + gguf + " OUT"});
}

TEST_CASE("checkpoint: indexes that lie") {
  const TempFolder folder;
  const std::string index = folder.path("model.safetensors.index.json");
  folder.write("a.safetensors", safetensors_bytes({fp32("x", {1})}));
  const auto error = [&](const std::string& text) {
    folder.write("model.safetensors.index.json", text);
    const std::string message = folder_error(folder);
    check_names(message, {index});
    return message;
  };
  check_names(error(R"({"weight_map":{"x":)"), {"truncated"});
  check_names(error("[]"), {"expected a JSON object", "found an array"});
  check_names(error("{}"), {"weight_map", "found none"});
  check_names(error(R"({"weight_map":[]})"), {"weight_map", "found an array"});
  check_names(error(index_text("{}")), {"at least one tensor"});
  check_names(error(index_text(R"({"x":1})")), {"\"x\"", "found the number 1"});
  check_names(error(index_text(R"({"x":"b.safetensors"})")),
              {"\"x\"", "the shard \"b.safetensors\"", "found none"});
  check_names(error(index_text(R"({"x":"a.safetensors","y":"a.safetensors"})")),
              {"\"y\"", "in the shard \"a.safetensors\"", "found none"});
  for (const char* outside : {"../a.safetensors", "/etc/passwd", "..", "", "a\\u0000b"}) {
    check_names(error(index_text(R"({"x":")" + std::string(outside) + "\"}")),
                {"in the same folder"});
  }
}
