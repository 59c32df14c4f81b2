#include "config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numbers>
#include <system_error>

#include "check.h"
#include "draft_tree.h"
#include "json_file.h"

namespace frspec {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr size_t kMaxConfigBytes = 16'000'000;
// Sizes beyond these are mistakes; below them no product of two sizes overflows.
constexpr int64_t kMaxHiddenSize = 1 << 17;
constexpr int64_t kMaxIntermediateSize = 1 << 20;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxVocabSize = 1 << 24;
constexpr int64_t kMaxPositions = 1 << 30;

// Typed access to the keys of an object. A key whose value is null counts as absent, as it does for
// Hugging Face.
class Keys {
 public:
  Keys(const json& object, std::string where) : object_(object), where_(std::move(where)) {}

  const std::string& where() const { return where_; }

  const json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  bool present(const char* key) const { return object_.find(key) != object_.end(); }

  int64_t integer(const char* key, int64_t least, int64_t most) const {
    const json* value = find(key);
    FRSPEC_CHECK(value != nullptr, ModelError, where_, ": ", key,
                 ": expected an integer, found none");
    return checked_integer(*value, key, least, most);
  }

  int64_t integer(const char* key, int64_t least, int64_t most, int64_t absent) const {
    return find(key) == nullptr ? absent : integer(key, least, most);
  }

  // A number in (above, most].
  double number(const char* key, double above, double most) const {
    const json* value = find(key);
    FRSPEC_CHECK(value != nullptr, ModelError, where_, ": ", key,
                 ": expected a number, found none");
    const bool in_range =
        value->is_number() && value->get<double>() > above && value->get<double>() <= most;
    FRSPEC_CHECK(in_range, ModelError, where_, ": ", key, ": expected a number above ", above,
                 " and at most ", most, ", found ", describe(*value));
    return value->get<double>();
  }

  double number(const char* key, double above, double most, double absent) const {
    return find(key) == nullptr ? absent : number(key, above, most);
  }

  bool boolean(const char* key, bool absent) const {
    const json* value = find(key);
    if (value == nullptr) return absent;
    FRSPEC_CHECK(value->is_boolean(), ModelError, where_, ": ", key,
                 ": expected true or false, found ", describe(*value));
    return value->get<bool>();
  }

  std::string string(const char* key, const std::string& absent) const {
    const json* value = find(key);
    if (value == nullptr) return absent;
    FRSPEC_CHECK(value->is_string(), ModelError, where_, ": ", key, ": expected a string, found ",
                 describe(*value));
    return value->get<std::string>();
  }

  // The object under `key`; a null pointer when it is absent.
  const json* object(const char* key) const {
    const json* value = find(key);
    FRSPEC_CHECK(value == nullptr || value->is_object(), ModelError, where_, ": ", key,
                 ": expected an object, found ", describe(value == nullptr ? json() : *value));
    return value;
  }

  int64_t checked_integer(const json& value, const char* key, int64_t least, int64_t most) const {
    // An unsigned value beyond int64 must not wrap into the range.
    const bool representable = value.is_number_integer() &&
                               (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
    FRSPEC_CHECK(representable && value.get<int64_t>() >= least && value.get<int64_t>() <= most,
                 ModelError, where_, ": ", key, ": expected an integer from ", least, " to ", most,
                 ", found ", describe(value));
    return value.get<int64_t>();
  }

 private:
  const json& object_;
  std::string where_;
};

// What Hugging Face's configuration classes assume, and what their layers hard-wire.
struct Architecture {
  std::string_view name;
  std::string_view model_type;
  int64_t max_position_embeddings;
  bool always_qkv_bias;
  bool has_bias_keys;  // attention_bias and mlp_bias mean something
};

constexpr Architecture kArchitectures[] = {
    {"LlamaForCausalLM", "llama", 2048, false, true},
    {"MistralForCausalLM", "mistral", 131072, false, false},
    {"Qwen2ForCausalLM", "qwen2", 32768, true, false},
};

const Architecture& read_architecture(const Keys& keys, bool drafter) {
  const json* names = keys.find("architectures");
  if (names != nullptr) {
    FRSPEC_CHECK(names->is_array() && !names->empty() && names->front().is_string(), ModelError,
                 keys.where(), ": architectures: expected a list of names, found ",
                 !names->is_array() ? describe(*names)
                 : names->empty()   ? "an empty one"
                                    : concat("one of ", describe(names->front())));
    const auto& name = names->front().get_ref<const std::string&>();
    for (const Architecture& known : kArchitectures) {
      if (known.name == name) return known;
    }
    throw ModelError(concat(keys.where(),
                            ": architectures: expected LlamaForCausalLM, MistralForCausalLM or "
                            "Qwen2ForCausalLM, found ",
                            quote(name)));
  }
  const std::string model_type = keys.string("model_type", drafter ? "llama" : "");
  for (const Architecture& known : kArchitectures) {
    if (known.model_type == model_type) return known;
  }
  throw ModelError(concat(keys.where(), ": architectures: expected a list of names, found none",
                          model_type.empty() ? "" : " (and model_type ",
                          model_type.empty() ? "" : quote(model_type) + ")"));
}

// Windowed attention is another network.
void refuse_sliding_window(const Keys& keys, const Architecture& architecture) {
  if (architecture.model_type == "qwen2") {
    FRSPEC_CHECK(!keys.boolean("use_sliding_window", false), ModelError, keys.where(),
                 ": use_sliding_window: expected false (sliding windows are not supported), found "
                 "true");
  }
  if (architecture.model_type == "mistral") {
    // Absent is not null here: Hugging Face's default is a window of 4096.
    const json* window = keys.find("sliding_window");
    FRSPEC_CHECK(keys.present("sliding_window") && window == nullptr, ModelError, keys.where(),
                 ": sliding_window: expected null (sliding windows are not supported), found ",
                 window == nullptr ? "none, which means 4096" : describe(*window));
  }
  if (const json* types = keys.find("layer_types")) {
    FRSPEC_CHECK(types->is_array(), ModelError, keys.where(),
                 ": layer_types: expected a list, found ", describe(*types));
    for (const json& type : *types) {
      FRSPEC_CHECK(type.is_string() && type.get_ref<const std::string&>() == "full_attention",
                   ModelError, keys.where(), ": layer_types: expected \"full_attention\", found ",
                   describe(type));
    }
  }
}

// Reads the scaling from `rope_scaling` (classic) or `rope_parameters` (newer; holds rope_theta
// too).
void read_rope(const Keys& keys, ModelConfig& config) {
  const json* classic = keys.object("rope_scaling");
  const json* parameters = keys.object("rope_parameters");
  const bool newer = parameters != nullptr;
  constexpr double kMaxTheta = 1e15;
  constexpr double kMaxFactor = 1e6;
  config.rope_theta = keys.number("rope_theta", 0.0, kMaxTheta, 10000.0);
  const auto refuse_partial_rotation = [](const Keys& of) {
    const double share = of.number("partial_rotary_factor", 0.0, kMaxFactor, 1.0);
    FRSPEC_CHECK(share == 1.0, ModelError, of.where(),
                 ": partial_rotary_factor: expected 1, found ", share);
  };
  refuse_partial_rotation(keys);
  const json* source = newer ? parameters : classic;
  if (source == nullptr || source->empty()) return;

  const Keys rope(*source, keys.where() + (newer ? ": rope_parameters" : ": rope_scaling"));
  config.rope_theta = rope.number("rope_theta", 0.0, kMaxTheta, config.rope_theta);
  refuse_partial_rotation(rope);
  for (const auto& [key, value] : source->items()) {
    FRSPEC_CHECK(!value.is_object(), ModelError, rope.where(), ": ", quote(key),
                 ": expected one RoPE for all layers, found an object (a RoPE per layer type?)");
  }
  const std::string old_spelling = rope.string("type", "");
  const std::string type = rope.string("rope_type", old_spelling);
  FRSPEC_CHECK(old_spelling.empty() || old_spelling == type, ModelError, rope.where(),
               ": expected rope_type and type to agree, found ", quote(type), " and ",
               quote(old_spelling));
  RopeScaling& scaling = config.rope_scaling;
  if (type == "default" || (type.empty() && newer)) return;
  if (type == "linear") {
    scaling.kind = RopeScaling::Kind::kLinear;
    scaling.factor = rope.number("factor", 0.0, kMaxFactor);
  } else if (type == "llama3") {
    scaling.kind = RopeScaling::Kind::kLlama3;
    scaling.factor = rope.number("factor", 0.0, kMaxFactor);
    scaling.low_freq_factor = rope.number("low_freq_factor", 0.0, kMaxFactor);
    scaling.high_freq_factor = rope.number("high_freq_factor", 0.0, kMaxFactor);
    scaling.original_max_position =
        rope.integer("original_max_position_embeddings", 1, kMaxPositions);
    FRSPEC_CHECK(scaling.low_freq_factor < scaling.high_freq_factor, ModelError, rope.where(),
                 ": expected low_freq_factor below high_freq_factor, found ",
                 scaling.low_freq_factor, " and ", scaling.high_freq_factor);
  } else {
    throw ModelError(concat(rope.where(), ": rope_type: expected default, linear or llama3, found ",
                            type.empty() ? "none" : quote(type)));
  }
}

// Token ids under `key`: an integer or a list. Ids outside the vocabulary (checkpoints write -1 for
// "none") can never occur and are dropped.
std::vector<int32_t> read_token_ids(const Keys& keys, const char* key, int64_t vocab_size) {
  std::vector<int32_t> ids;
  const json* value = keys.find(key);
  if (value == nullptr) return ids;
  const auto add = [&](const json& item) {
    FRSPEC_CHECK(item.is_number_integer(), ModelError, keys.where(), ": ", key,
                 ": expected a token id or a list of token ids, found ", describe(item));
    const int64_t id = keys.checked_integer(item, key, INT32_MIN, INT32_MAX);
    const auto token = static_cast<int32_t>(id);
    const bool in_vocabulary = id >= 0 && id < vocab_size;
    if (in_vocabulary && std::find(ids.begin(), ids.end(), token) == ids.end()) {
      ids.push_back(token);
    }
  };
  if (!value->is_array()) {
    add(*value);
    return ids;
  }
  constexpr size_t kMaxIds = 1024;
  FRSPEC_CHECK(value->size() <= kMaxIds, ModelError, keys.where(), ": ", key, ": expected at most ",
               kMaxIds, " token ids, found ", value->size());
  for (const json& item : *value) add(item);
  return ids;
}

// kind: "model" or "drafter".
std::string config_path(const std::string& folder, const char* kind) {
  std::error_code failure;
  FRSPEC_CHECK(fs::is_directory(folder, failure), ModelError, folder, ": expected a ", kind,
               " folder, found ", fs::exists(folder, failure) ? "a file" : "nothing");
  return (fs::path(folder) / "config.json").string();
}

std::optional<uint64_t> synthetic_seed(const Keys& keys) {
  if (keys.find("frspec_synthetic_seed") == nullptr) return std::nullopt;
  return static_cast<uint64_t>(keys.integer("frspec_synthetic_seed", 0, INT32_MAX));
}

ModelConfig read_config(const std::string& folder, bool drafter) {
  const std::string path = config_path(folder, drafter ? "drafter" : "model");
  const json object = read_json_object(path, kMaxConfigBytes);
  const Keys keys(object, path);

  ModelConfig config;
  const Architecture& architecture = read_architecture(keys, drafter);
  config.architecture = architecture.name;
  refuse_sliding_window(keys, architecture);
  FRSPEC_CHECK(keys.find("quantization_config") == nullptr, ModelError, path,
               ": quantization_config: expected none (weights in fp32, fp16 or bf16), found one");
  const std::string activation = keys.string("hidden_act", "silu");
  FRSPEC_CHECK(activation == "silu", ModelError, path, ": hidden_act: expected \"silu\", found ",
               quote(activation));

  config.hidden_size = keys.integer("hidden_size", 1, kMaxHiddenSize);
  config.intermediate_size = keys.integer("intermediate_size", 1, kMaxIntermediateSize);
  config.num_layers = keys.integer("num_hidden_layers", 1, kMaxLayers);
  config.num_heads = keys.integer("num_attention_heads", 1, kMaxHeads);
  config.num_kv_heads = keys.integer("num_key_value_heads", 1, kMaxHeads, config.num_heads);
  FRSPEC_CHECK(config.num_heads % config.num_kv_heads == 0, ModelError, path,
               ": expected num_attention_heads divisible by num_key_value_heads, found ",
               config.num_heads, " and ", config.num_kv_heads);
  if (keys.find("head_dim") == nullptr) {
    FRSPEC_CHECK(config.hidden_size % config.num_heads == 0, ModelError, path,
                 ": expected hidden_size divisible by num_attention_heads (there is no head_dim), "
                 "found ",
                 config.hidden_size, " and ", config.num_heads);
    config.head_dim = config.hidden_size / config.num_heads;
  } else {
    config.head_dim = keys.integer("head_dim", 1, INT32_MAX);
  }
  FRSPEC_CHECK(config.head_dim % 8 == 0 && config.head_dim <= kMaxHeadDim, ModelError, path,
               ": head_dim: expected a multiple of 8 up to ", kMaxHeadDim, ", found ",
               config.head_dim);
  config.vocab_size = drafter ? keys.integer("vocab_size", 1, kMaxVocabSize, 0)
                              : keys.integer("vocab_size", 1, kMaxVocabSize);
  config.max_position_embeddings = keys.integer("max_position_embeddings", 1, kMaxPositions,
                                                drafter ? 0 : architecture.max_position_embeddings);
  config.rms_norm_eps = static_cast<float>(keys.number("rms_norm_eps", 0.0, 1.0, 1e-6));
  read_rope(keys, config);
  config.tie_word_embeddings = keys.boolean("tie_word_embeddings", false);
  const bool attention_bias = architecture.has_bias_keys && keys.boolean("attention_bias", false);
  config.qkv_bias = architecture.always_qkv_bias || attention_bias;
  config.o_bias = attention_bias;
  config.mlp_bias = architecture.has_bias_keys && keys.boolean("mlp_bias", false);

  const char* dtype_key = keys.find("dtype") != nullptr ? "dtype" : "torch_dtype";
  const std::string dtype = keys.string(dtype_key, "");
  if (!dtype.empty()) {
    try {
      config.dtype = parse_dtype(dtype);
    } catch (const RequestError& error) {
      throw ModelError(concat(path, ": ", dtype_key, ": ", error.what()));
    }
  }
  config.eos_token_ids = read_token_ids(keys, "eos_token_id", config.vocab_size);
  config.synthetic_seed = synthetic_seed(keys);
  return config;
}

}  // namespace

ModelConfig read_model_config(const std::string& folder) {
  ModelConfig config = read_config(folder, /*drafter=*/false);
  // Generation settings win: chat models list their end-of-turn tokens there.
  const fs::path generation = fs::path(folder) / "generation_config.json";
  std::error_code failure;
  if (fs::exists(generation, failure)) {
    const json object = read_json_object(generation.string(), kMaxConfigBytes);
    const Keys keys(object, generation.string());
    if (keys.find("eos_token_id") != nullptr) {
      config.eos_token_ids = read_token_ids(keys, "eos_token_id", config.vocab_size);
    }
  }
  return config;
}

ModelConfig read_eagle_config(const std::string& folder) {
  return read_config(folder, /*drafter=*/true);
}

std::optional<MedusaConfig> read_medusa_config(const std::string& folder) {
  const std::string path = config_path(folder, "drafter");
  const json object = read_json_object(path, kMaxConfigBytes);
  const Keys keys(object, path);
  if (keys.find("medusa_num_heads") == nullptr) return std::nullopt;
  MedusaConfig config;
  config.num_heads = keys.integer("medusa_num_heads", 1, kMaxTreeDepth);
  config.num_layers = keys.integer("medusa_num_layers", 0, kMaxLayers, 1);
  config.hidden_size = keys.integer("hidden_size", 1, kMaxHiddenSize, 0);
  config.vocab_size = keys.integer("vocab_size", 1, kMaxVocabSize, 0);
  config.synthetic_seed = synthetic_seed(keys);
  return config;
}

DType parse_dtype(const std::string& name) {
  if (name == "bf16" || name == "bfloat16") return DType::kBF16;
  if (name == "fp16" || name == "float16" || name == "half") return DType::kF16;
  if (name == "fp32" || name == "float32") return DType::kF32;
  throw RequestError(
      concat("expected dtype bf16, bfloat16, fp16, float16, half, fp32 or float32, "
             "found ",
             quote(name)));
}

std::vector<double> rope_inverse_frequencies(const ModelConfig& config) {
  const RopeScaling& scaling = config.rope_scaling;
  std::vector<double> frequencies(static_cast<size_t>(config.head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim);
    double frequency = std::pow(config.rope_theta, -exponent);
    if (scaling.kind == RopeScaling::Kind::kLinear) {
      frequency /= scaling.factor;
    } else if (scaling.kind == RopeScaling::Kind::kLlama3) {
      // How often the pair turns within the original context decides: often enough, and it keeps
      // its frequency; seldom, and it is interpolated; between the two a linear blend. This is
      // _compute_llama3_parameters of Hugging Face's modeling_rope_utils, whose wavelength
      // thresholds are these counts of turns.
      const double turns =
          static_cast<double>(scaling.original_max_position) * frequency / (2.0 * std::numbers::pi);
      const double kept = std::clamp(
          (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor),
          0.0, 1.0);
      frequency *= kept + (1.0 - kept) / scaling.factor;
    }
    frequencies[i] = frequency;
  }
  return frequencies;
}

}  // namespace frspec
