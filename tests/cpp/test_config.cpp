#include "config.h"

#include <doctest/doctest.h>

#include <cmath>
#include <random>

#include "check.h"
#include "file_fixtures.h"

using namespace frspec;        // NOLINT
using namespace frspec::test;  // NOLINT
using nlohmann::json;

namespace {

json llama_json() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000,
    "rope_scaling": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2})");
}

ModelConfig read(const json& config) {
  const TempFolder folder;
  folder.write("config.json", config.dump());
  return read_model_config(folder.path());
}

// The changes to a valid config, applied by JSON merge patch except that a null stays a null.
json with(json config, const json& changes) {
  for (const auto& [key, value] : changes.items()) config[key] = value;
  return config;
}

ModelConfig read_with(const json& changes) { return read(with(llama_json(), changes)); }

std::string error_with(const json& changes) {
  const TempFolder folder;
  const std::string path = folder.write("config.json", with(llama_json(), changes).dump());
  const std::string message = error_message<ModelError>([&] { read_model_config(folder.path()); });
  check_names(message, {path});
  return message;
}

json llama3_scaling() {
  return {{"factor", 8.0},
          {"low_freq_factor", 1.0},
          {"high_freq_factor", 4.0},
          {"original_max_position_embeddings", 8192},
          {"rope_type", "llama3"}};
}

}  // namespace

TEST_CASE("config: every key of a Llama config") {
  const ModelConfig config = read(llama_json());
  CHECK(config.architecture == "LlamaForCausalLM");
  CHECK(config.hidden_size == 576);
  CHECK(config.intermediate_size == 1536);
  CHECK(config.num_layers == 30);
  CHECK(config.num_heads == 9);
  CHECK(config.num_kv_heads == 3);
  CHECK(config.head_dim == 64);
  CHECK(config.vocab_size == 49152);
  CHECK(config.max_position_embeddings == 8192);
  CHECK(config.rms_norm_eps == 1e-5f);
  CHECK(config.rope_theta == 100000.0);
  CHECK(config.rope_scaling.kind == RopeScaling::Kind::kNone);
  CHECK(config.tie_word_embeddings);
  CHECK_FALSE(config.qkv_bias);
  CHECK_FALSE(config.o_bias);
  CHECK_FALSE(config.mlp_bias);
  CHECK(config.dtype == DType::kBF16);
  CHECK(config.eos_token_ids == std::vector<int32_t>{2});
}

TEST_CASE("config: absent and null keys take Hugging Face's defaults") {
  json config = llama_json();
  for (const char* key : {"num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
                          "rope_theta", "rope_scaling", "tie_word_embeddings", "torch_dtype",
                          "bos_token_id", "eos_token_id", "hidden_act", "model_type"}) {
    config.erase(key);
  }
  config["head_dim"] = nullptr;
  const ModelConfig llama = read(config);
  CHECK(llama.num_kv_heads == 9);
  CHECK(llama.head_dim == 64);
  CHECK(llama.max_position_embeddings == 2048);
  CHECK(llama.rms_norm_eps == 1e-6f);
  CHECK(llama.rope_theta == 10000.0);
  CHECK_FALSE(llama.tie_word_embeddings);
  CHECK_FALSE(llama.dtype.has_value());
  CHECK(llama.eos_token_ids.empty());
  config["architectures"] = {"Qwen2ForCausalLM"};
  CHECK(read(config).max_position_embeddings == 32768);
  config.erase("architectures");
  config["model_type"] = "qwen2";
  CHECK(read(config).architecture == "Qwen2ForCausalLM");
}

TEST_CASE("config: biases, head_dim and dtype") {
  const ModelConfig biased = read_with({{"attention_bias", true}, {"mlp_bias", true}});
  CHECK(biased.qkv_bias);
  CHECK(biased.o_bias);
  CHECK(biased.mlp_bias);
  const ModelConfig qwen = read_with(
      {{"architectures", {"Qwen2ForCausalLM"}}, {"use_sliding_window", false}, {"head_dim", 128}});
  CHECK(qwen.qkv_bias);
  CHECK_FALSE(qwen.o_bias);
  CHECK_FALSE(qwen.mlp_bias);
  CHECK(qwen.head_dim == 128);
  CHECK(read_with({{"dtype", "float16"}}).dtype == DType::kF16);
  CHECK(read_with({{"torch_dtype", "float32"}}).dtype == DType::kF32);
  check_names(error_with({{"torch_dtype", "float8_e4m3fn"}}),
              {"torch_dtype", "expected dtype bf16", "float8_e4m3fn"});
}

TEST_CASE("config: parse_dtype") {
  for (const char* name : {"bf16", "bfloat16"}) CHECK(parse_dtype(name) == DType::kBF16);
  for (const char* name : {"fp16", "float16", "half"}) CHECK(parse_dtype(name) == DType::kF16);
  for (const char* name : {"fp32", "float32"}) CHECK(parse_dtype(name) == DType::kF32);
  check_names(error_message<RequestError>([] { parse_dtype("int8"); }),
              {"bf16, bfloat16, fp16, float16, half, fp32 or float32", "found \"int8\""});
}

TEST_CASE("config: end tokens") {
  CHECK(read_with({{"eos_token_id", {7, 5, 7}}}).eos_token_ids == std::vector<int32_t>{7, 5});
  // -1 and ids beyond the vocabulary never occur.
  CHECK(read_with({{"eos_token_id", {-1, 5, 49152}}}).eos_token_ids == std::vector<int32_t>{5});
  check_names(error_with({{"eos_token_id", "</s>"}}), {"eos_token_id", "the string \"</s>\""});
  check_names(error_with({{"eos_token_id", {1, true}}}), {"eos_token_id", "found true"});
  check_names(error_with({{"eos_token_id", 1LL << 40}}), {"eos_token_id", "1099511627776"});
  check_names(error_with({{"eos_token_id", std::vector<int>(2000)}}), {"at most 1024", "2000"});

  const TempFolder folder;
  folder.write("config.json", llama_json().dump());
  const std::string generation =
      folder.write("generation_config.json", R"({"eos_token_id":[9,8]})");
  CHECK(read_model_config(folder.path()).eos_token_ids == std::vector<int32_t>{9, 8});
  folder.write("generation_config.json", R"({"temperature":0.5})");
  CHECK(read_model_config(folder.path()).eos_token_ids == std::vector<int32_t>{2});
  folder.write("generation_config.json", R"({"eos_token_id":)");
  check_names(error_message<ModelError>([&] { read_model_config(folder.path()); }),
              {generation, "truncated"});
}

TEST_CASE("config: RoPE in both spellings") {
  const ModelConfig linear = read_with({{"rope_scaling", {{"type", "linear"}, {"factor", 4}}}});
  CHECK(linear.rope_scaling.kind == RopeScaling::Kind::kLinear);
  CHECK(linear.rope_scaling.factor == 4.0);
  const ModelConfig llama3 = read_with({{"rope_scaling", llama3_scaling()}});
  CHECK(llama3.rope_scaling.kind == RopeScaling::Kind::kLlama3);
  CHECK(llama3.rope_scaling.factor == 8.0);
  CHECK(llama3.rope_scaling.low_freq_factor == 1.0);
  CHECK(llama3.rope_scaling.high_freq_factor == 4.0);
  CHECK(llama3.rope_scaling.original_max_position == 8192);
  CHECK(read_with({{"rope_scaling", {{"rope_type", "default"}}}}).rope_scaling.kind ==
        RopeScaling::Kind::kNone);

  json newer = llama3_scaling();
  newer["rope_theta"] = 500000.0;
  const ModelConfig parameters = read_with({{"rope_parameters", newer}});
  CHECK(parameters.rope_theta == 500000.0);
  CHECK(parameters.rope_scaling.kind == RopeScaling::Kind::kLlama3);
  const ModelConfig plain = read_with({{"rope_parameters", {{"rope_theta", 250.5}}}});
  CHECK(plain.rope_theta == 250.5);
  CHECK(plain.rope_scaling.kind == RopeScaling::Kind::kNone);
}

TEST_CASE("config: RoPE that is refused") {
  for (const char* type : {"yarn", "dynamic", "longrope", "mrope"}) {
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
      check_names(error_with({{key, {{"rope_type", type}, {"factor", 2.0}}}}),
                  {key, "expected default, linear or llama3", type});
    }
  }
  check_names(error_with({{"rope_scaling", {{"factor", 2.0}}}}), {"rope_type", "found none"});
  check_names(error_with({{"rope_scaling", {{"type", "linear"}, {"rope_type", "yarn"}}}}),
              {"to agree", "linear", "yarn"});
  check_names(error_with({{"rope_scaling", {{"type", "linear"}}}}), {"factor", "found none"});
  check_names(error_with({{"rope_scaling", {{"type", "linear"}, {"factor", 0}}}}),
              {"factor", "above 0", "found the number 0"});
  check_names(error_with({{"rope_scaling", "linear"}}), {"rope_scaling", "expected an object"});
  check_names(error_with({{"rope_theta", -1}}), {"rope_theta", "above 0", "-1"});
  check_names(error_with({{"rope_theta", "big"}}), {"rope_theta", "the string \"big\""});
  check_names(error_with({{"partial_rotary_factor", 0.5}}), {"partial_rotary_factor", "0.5"});
  check_names(error_with({{"rope_parameters", {{"full_attention", {{"rope_theta", 1.0}}}}}}),
              {"one RoPE for all layers", "full_attention"});
  for (const char* key :
       {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
    json scaling = llama3_scaling();
    scaling.erase(key);
    check_names(error_with({{"rope_scaling", scaling}}), {key, "found none"});
  }
  json scaling = llama3_scaling();
  scaling["low_freq_factor"] = 4.0;
  check_names(error_with({{"rope_scaling", scaling}}), {"low_freq_factor below high_freq_factor"});
}

TEST_CASE("config: networks that are refused by name") {
  check_names(error_with({{"architectures", {"GemmaForCausalLM"}}}),
              {"architectures", "LlamaForCausalLM", "\"GemmaForCausalLM\""});
  check_names(error_with({{"architectures", json::array()}}), {"architectures"});
  check_names(error_with({{"architectures", "LlamaForCausalLM"}}), {"expected a list of names"});
  check_names(error_with({{"architectures", nullptr}, {"model_type", "gemma"}}), {"\"gemma\""});
  check_names(error_with({{"architectures", nullptr}, {"model_type", nullptr}}), {"found none"});
  check_names(error_with({{"hidden_act", "gelu"}}), {"hidden_act", "\"silu\"", "\"gelu\""});
  check_names(error_with({{"architectures", {"Qwen2ForCausalLM"}}, {"use_sliding_window", true}}),
              {"use_sliding_window", "found true"});
  check_names(error_with({{"layer_types", {"full_attention", "sliding_attention"}}}),
              {"layer_types", "sliding_attention"});
  check_names(error_with({{"quantization_config", {{"bits", 4}}}}), {"quantization_config"});
  const json mistral = {{"architectures", {"MistralForCausalLM"}}};
  check_names(error_with(mistral), {"sliding_window", "which means 4096"});
  check_names(error_with(with(mistral, {{"sliding_window", 4096}})), {"sliding_window", "4096"});
  CHECK(read_with(with(mistral, {{"sliding_window", nullptr}})).architecture ==
        "MistralForCausalLM");
}

TEST_CASE("config: sizes and types that are refused") {
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "vocab_size"}) {
    check_names(error_with({{key, nullptr}}), {key, "expected an integer", "found none"});
    check_names(error_with({{key, "8"}}), {key, "expected an integer", "the string \"8\""});
    check_names(error_with({{key, 8.0}}), {key, "expected an integer", "the number 8.0"});
    check_names(error_with({{key, true}}), {key, "expected an integer", "found true"});
    check_names(error_with({{key, 0}}), {key, "from 1 to", "the number 0"});
    check_names(error_with({{key, -8}}), {key, "from 1 to", "the number -8"});
    check_names(error_with({{key, 1LL << 40}}), {key, "from 1 to", "1099511627776"});
    check_names(error_with({{key, UINT64_MAX}}), {key, "18446744073709551615"});
  }
  check_names(error_with({{"num_key_value_heads", 2}}),
              {"divisible by num_key_value_heads", "found 9 and 2"});
  check_names(error_with({{"num_attention_heads", 11}, {"num_key_value_heads", 11}}),
              {"hidden_size divisible", "found 576 and 11"});
  check_names(error_with({{"head_dim", 60}}), {"head_dim", "multiple of 8", "found 60"});
  check_names(error_with({{"head_dim", 8000}}), {"head_dim", "found 8000"});
  check_names(error_with({{"rms_norm_eps", 0}}), {"rms_norm_eps", "above 0"});
  check_names(error_with({{"rms_norm_eps", "1e-5"}}), {"rms_norm_eps", "the string"});
  check_names(error_with({{"tie_word_embeddings", 1}}), {"tie_word_embeddings", "true or false"});
  check_names(error_with({{"max_position_embeddings", 0}}), {"max_position_embeddings"});
}

TEST_CASE("config: files that are missing or damaged") {
  check_names(error_message<ModelError>([] { read_model_config("/nonexistent/model"); }),
              {"/nonexistent/model", "expected a model folder", "found nothing"});
  const TempFolder folder;
  const auto error = [&] {
    const std::string message =
        error_message<ModelError>([&] { read_model_config(folder.path()); });
    check_names(message, {folder.path("config.json")});
    return message;
  };
  check_names(error(), {"expected a file, found none"});
  const std::string text = llama_json().dump();
  for (const size_t length : {size_t{0}, size_t{1}, text.size() / 2, text.size() - 1}) {
    folder.write("config.json", text.substr(0, length));
    check_names(error(), {"truncated"});
  }
  folder.write("config.json", "[]");
  check_names(error(), {"expected a JSON object", "found an array"});
  folder.write("config.json", R"({"hidden_size":1,"hidden_size":2})");
  check_names(error(), {"\"hidden_size\" twice"});
  folder.write("config.json", text + "}");
  check_names(error(), {"found an error at byte"});
}

TEST_CASE("config: EAGLE drafters") {
  const TempFolder folder;
  json config = llama_json();
  for (const char* key : {"architectures", "model_type", "vocab_size", "max_position_embeddings"}) {
    config.erase(key);
  }
  config["num_hidden_layers"] = 1;
  config["bias"] = true;
  config["pretraining_tp"] = 1;
  folder.write("config.json", config.dump());
  const ModelConfig eagle = read_eagle_config(folder.path());
  CHECK(eagle.architecture == "LlamaForCausalLM");
  CHECK(eagle.num_layers == 1);
  CHECK(eagle.vocab_size == 0);
  CHECK(eagle.max_position_embeddings == 0);
  CHECK(eagle.rope_theta == 100000.0);
  check_names(error_message<ModelError>([&] { read_model_config(folder.path()); }),
              {"architectures"});
  config["architectures"] = {"LlamaForCausalLMEagle3"};
  folder.write("config.json", config.dump());
  check_names(error_message<ModelError>([&] { read_eagle_config(folder.path()); }),
              {"\"LlamaForCausalLMEagle3\""});
  check_names(error_message<ModelError>([&] { read_eagle_config(folder.path("none")); }),
              {"expected a drafter folder"});
}

TEST_CASE("config: rope_inverse_frequencies against values computed by hand") {
  ModelConfig config;
  config.head_dim = 8;
  config.rope_theta = 10000.0;
  const std::vector<double> plain = rope_inverse_frequencies(config);
  REQUIRE(plain.size() == 4);
  for (size_t i = 0; i < 4; ++i) {  // 10000^(-i/4)
    CHECK(plain[i] == doctest::Approx(std::vector{1.0, 0.1, 0.01, 0.001}[i]).epsilon(1e-14));
  }
  config.rope_scaling = {.kind = RopeScaling::Kind::kLinear, .factor = 4.0};
  for (size_t i = 0; i < 4; ++i) {
    CHECK(rope_inverse_frequencies(config)[i] == doctest::Approx(plain[i] / 4).epsilon(1e-14));
  }
  // Original context 2048, so the pairs turn 2048 f / 2 pi = 325.95, 32.595, 3.2595, 0.32595 times:
  // the first two keep their frequency (above 4 turns), the last is divided by 8 (below 1 turn),
  // and the third blends with s = (3.259493234522017 - 1) / (4 - 1) = 0.753164411507339:
  // 0.01 (s + (1 - s) / 8) = 0.0078401886006892.
  config.rope_scaling = {.kind = RopeScaling::Kind::kLlama3,
                         .factor = 8.0,
                         .low_freq_factor = 1.0,
                         .high_freq_factor = 4.0,
                         .original_max_position = 2048};
  const std::vector<double> llama3 = rope_inverse_frequencies(config);
  CHECK(llama3[0] == plain[0]);
  CHECK(llama3[1] == plain[1]);
  CHECK(llama3[2] == doctest::Approx(0.0078401886006892).epsilon(1e-12));
  CHECK(llama3[3] == doctest::Approx(0.000125).epsilon(1e-14));
}

TEST_CASE("config: random damage gives a ModelError or a config within its limits") {
  json valid = llama_json();
  valid["rope_scaling"] = llama3_scaling();
  valid["head_dim"] = 64;
  const std::string text = valid.dump();
  const std::vector<std::string> values = {"0",
                                           "-1",
                                           "1e300",
                                           "null",
                                           "true",
                                           "[]",
                                           "{}",
                                           "\"x\"",
                                           "9223372036854775808",
                                           "0.5",
                                           "64",
                                           "8",
                                           "\"yarn\"",
                                           "[1,2]",
                                           "1e-300",
                                           "\"MistralForCausalLM\""};
  std::mt19937_64 random(42);
  const auto below = [&](size_t limit) { return static_cast<size_t>(random() % limit); };
  const TempFolder folder;
  int refused = 0;
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string bytes = text;
    if (round % 2 == 0) {  // a value replaced by another
      json changed = valid;
      auto item = changed.begin();
      std::advance(item, static_cast<std::ptrdiff_t>(below(changed.size())));
      *item = json::parse(values[below(values.size())]);
      bytes = changed.dump();
    }
    if (round % 2 == 1 || below(4) == 0) {
      const size_t at = below(bytes.size());
      switch (below(3)) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1: {
          const size_t digit = bytes.find_first_of("0123456789", at);
          if (digit != std::string::npos) bytes[digit] = static_cast<char>('0' + below(10));
          break;
        }
        default:
          bytes.erase(at, 1 + below(4));
      }
    }
    folder.write("config.json", bytes);
    try {
      const ModelConfig config = read_model_config(folder.path());
      CAPTURE(bytes);
      REQUIRE(config.head_dim % 8 == 0);
      REQUIRE(config.num_heads % config.num_kv_heads == 0);
      REQUIRE(config.rope_theta > 0);
      for (const double frequency : rope_inverse_frequencies(config)) {
        REQUIRE(std::isfinite(frequency));
      }
      ++accepted;
    } catch (const ModelError& error) {
      REQUIRE(std::string(error.what()).find('\n') == std::string::npos);
      ++refused;
    }
  }
  CHECK(refused > 500);
  CHECK(accepted > 200);
}
