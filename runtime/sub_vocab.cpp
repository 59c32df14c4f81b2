#include "sub_vocab.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <span>

#include "check.h"
#include "json_file.h"
#include "safetensors.h"

namespace frspec {

using nlohmann::json;

namespace {

constexpr const char* kFormat = "frspec-ranking";
constexpr const char* kVersion = "1";

std::string metadata_value(const SafetensorsFile& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  return found == file.metadata().end() ? "" : found->second;
}

HostTensor read_vector(const SafetensorsFile& file, const std::string& name, DType dtype) {
  const HostTensor tensor = file.tensor(name);
  FRSPEC_CHECK(tensor.dtype == dtype, RankingError, file.path(), ": tensor ", name, ": expected ",
               dtype_name(dtype), ", found ", dtype_name(tensor.dtype));
  FRSPEC_CHECK(tensor.shape.size() == 1, RankingError, file.path(), ": tensor ", name,
               ": expected one dimension, found shape ", shape_text(tensor.shape));
  return tensor;
}

// Marks in `required` the tokens that every sub-vocabulary holds.
std::vector<bool> required_tokens(const SafetensorsFile& file, int64_t vocab_size,
                                  const std::vector<int32_t>& eos_token_ids) {
  std::vector<bool> required(static_cast<size_t>(vocab_size), false);
  const std::string where = file.path() + ": special_ids";
  const std::string text = metadata_value(file, "special_ids");
  FRSPEC_CHECK(!text.empty(), RankingError, where,
               ": expected a JSON list of token ids, found none");
  const json special_ids = parse_json(text, where);
  FRSPEC_CHECK(special_ids.is_array(), RankingError, where,
               ": expected a list of token ids, found ", describe(special_ids));
  for (const json& item : special_ids) {
    FRSPEC_CHECK(item.is_number_unsigned(), RankingError, where, ": expected token ids, found ",
                 describe(item));
    // A tokenizer may know special tokens that the model has no row for.
    const auto id = item.get<uint64_t>();
    if (id < static_cast<uint64_t>(vocab_size)) required[id] = true;
  }
  for (const int32_t id : eos_token_ids) {
    if (id >= 0 && id < vocab_size) required[static_cast<size_t>(id)] = true;
  }
  return required;
}

std::vector<int32_t> choose_sub_vocab(const SafetensorsFile& file, int64_t size, int64_t vocab_size,
                                      const std::vector<int32_t>& eos_token_ids) {
  const std::string& path = file.path();
  const HostTensor id_tensor = read_vector(file, "token_ids", DType::kI32);
  const HostTensor count_tensor = read_vector(file, "counts", DType::kI64);
  FRSPEC_CHECK(id_tensor.shape == count_tensor.shape, RankingError, path,
               ": expected as many counts as token_ids, found ", count_tensor.shape[0], " and ",
               id_tensor.shape[0]);
  const auto ranked_size = static_cast<size_t>(id_tensor.shape[0]);
  const std::span ids(static_cast<const int32_t*>(id_tensor.data), ranked_size);
  const std::span counts(static_cast<const int64_t*>(count_tensor.data), ranked_size);
  FRSPEC_CHECK(size <= id_tensor.shape[0], RankingError, path,
               ": expected a sub-vocabulary of at most the ", ranked_size,
               " tokens that the file ranks, found ", size);

  std::vector<bool> ranked(static_cast<size_t>(vocab_size), false);
  for (size_t rank = 0; rank < ranked_size; ++rank) {
    const int32_t id = ids[rank];
    FRSPEC_CHECK(id >= 0 && id < vocab_size, RankingError, path, ": token_ids[", rank,
                 "]: expected an id from 0 to ", vocab_size - 1, ", found ", id);
    FRSPEC_CHECK(!ranked[static_cast<size_t>(id)], RankingError, path, ": token_ids[", rank,
                 "]: expected every id once, found ", id, " again");
    ranked[static_cast<size_t>(id)] = true;
    FRSPEC_CHECK(counts[rank] >= 0 && (rank == 0 || counts[rank] <= counts[rank - 1]), RankingError,
                 path, ": counts[", rank, "]: expected counts in descending order, found ",
                 counts[rank], rank == 0 ? "" : concat(" after ", counts[rank - 1]));
  }

  const std::vector<bool> required = required_tokens(file, vocab_size, eos_token_ids);
  const int64_t required_count = std::count(required.begin(), required.end(), true);
  FRSPEC_CHECK(required_count <= size, RankingError, path,
               ": expected a sub-vocabulary that holds the ", required_count,
               " special tokens, found size ", size);
  int64_t ordinary_left = size - required_count;
  std::vector<int32_t> sub_vocab;
  sub_vocab.reserve(static_cast<size_t>(size));
  for (const int32_t id : ids) {
    const bool is_required = required[static_cast<size_t>(id)];
    if (!is_required && ordinary_left == 0) continue;
    if (!is_required) --ordinary_left;
    sub_vocab.push_back(id);
  }
  for (size_t id = 0; id < required.size(); ++id) {
    if (required[id] && !ranked[id]) sub_vocab.push_back(static_cast<int32_t>(id));
  }
  return sub_vocab;
}

}  // namespace

std::vector<int32_t> read_sub_vocab(const std::string& path, int64_t size, int64_t vocab_size,
                                    const std::vector<int32_t>& eos_token_ids,
                                    const std::string& expected_fingerprint) {
  FRSPEC_CHECK(size >= 1 && size <= vocab_size, RankingError, path,
               ": expected a sub-vocabulary of 1 to ", vocab_size,
               " tokens (the model's vocabulary), found ", size);
  try {
    const SafetensorsFile file(path);
    const std::string format = metadata_value(file, "format");
    FRSPEC_CHECK(format == kFormat, RankingError, path, ": expected metadata format \"", kFormat,
                 "\", found ", format.empty() ? "none" : quote(format));
    const std::string version = metadata_value(file, "version");
    FRSPEC_CHECK(version == kVersion, RankingError, path, ": expected metadata version \"",
                 kVersion, "\", found ", version.empty() ? "none" : quote(version));
    const std::string fingerprint = metadata_value(file, "tokenizer_fingerprint");
    FRSPEC_CHECK(expected_fingerprint.empty() || fingerprint == expected_fingerprint, RankingError,
                 path, ": expected a ranking for the tokenizer ", quote(expected_fingerprint),
                 ", found one for ", fingerprint.empty() ? "none" : quote(fingerprint));
    return choose_sub_vocab(file, size, vocab_size, eos_token_ids);
  } catch (const ModelError& error) {
    // The file is damaged as a safetensors file or in its JSON.
    throw RankingError(error.what());
  }
}

}  // namespace frspec
