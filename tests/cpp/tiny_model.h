// Writes tiny random model folders for the engine's tests.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

namespace frspec::test {

struct TinySizes {
  int64_t vocab = 211;
  int64_t hidden = 40;
  int64_t ffn = 56;
  int64_t layers = 2;
  int64_t heads = 4;
  int64_t kv_heads = 2;
  int64_t head_dim = 16;
};

class FolderWriter {
 public:
  explicit FolderWriter(const std::string& name, uint32_t seed)
      : folder_(std::filesystem::temp_directory_path() / ("frspec_test_" + name)), random_(seed) {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }

  void normal(const std::string& name, std::vector<int64_t> shape, float scale, float mean = 0.0f) {
    std::normal_distribution<float> noise(mean, scale);
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = noise(random_);
    const size_t begin = bytes_.size();
    bytes_.resize(begin + values.size() * sizeof(float));
    std::memcpy(bytes_.data() + begin, values.data(), values.size() * sizeof(float));
    header_[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, bytes_.size()}}};
  }

  void decoder_layer(const std::string& prefix, const TinySizes& s, bool input_norm) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.hidden));
    const int64_t q = s.heads * s.head_dim;
    const int64_t kv = s.kv_heads * s.head_dim;
    if (input_norm) normal(prefix + "input_layernorm.weight", {s.hidden}, 0.1f, 1.0f);
    normal(prefix + "self_attn.q_proj.weight", {q, s.hidden}, scale);
    normal(prefix + "self_attn.k_proj.weight", {kv, s.hidden}, scale);
    normal(prefix + "self_attn.v_proj.weight", {kv, s.hidden}, scale);
    normal(prefix + "self_attn.o_proj.weight", {s.hidden, q}, scale);
    normal(prefix + "post_attention_layernorm.weight", {s.hidden}, 0.1f, 1.0f);
    normal(prefix + "mlp.gate_proj.weight", {s.ffn, s.hidden}, scale);
    normal(prefix + "mlp.up_proj.weight", {s.ffn, s.hidden}, scale);
    normal(prefix + "mlp.down_proj.weight", {s.hidden, s.ffn}, scale);
  }

  std::string finish(const TinySizes& s, int64_t layers) {
    const nlohmann::json config = {{"architectures", {"LlamaForCausalLM"}},
                                   {"model_type", "llama"},
                                   {"hidden_size", s.hidden},
                                   {"intermediate_size", s.ffn},
                                   {"num_hidden_layers", layers},
                                   {"num_attention_heads", s.heads},
                                   {"num_key_value_heads", s.kv_heads},
                                   {"head_dim", s.head_dim},
                                   {"vocab_size", s.vocab},
                                   {"max_position_embeddings", 2048},
                                   {"rms_norm_eps", 1e-5},
                                   {"rope_theta", 10000.0},
                                   {"tie_word_embeddings", true},
                                   {"hidden_act", "silu"},
                                   {"eos_token_id", 1},
                                   {"torch_dtype", "float32"}};
    std::ofstream(folder_ / "config.json") << config.dump();
    std::string header = header_.dump();
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const uint64_t size = header.size();
    std::ofstream file(folder_ / "model.safetensors", std::ios::binary);
    file.write(reinterpret_cast<const char*>(&size), sizeof(size));
    file << header;
    file.write(bytes_.data(), static_cast<std::streamsize>(bytes_.size()));
    return folder_.string();
  }

 private:
  std::filesystem::path folder_;
  std::mt19937 random_;
  nlohmann::json header_ = nlohmann::json::object();
  std::vector<char> bytes_;
};

inline std::string write_tiny_target(const std::string& name, const TinySizes& s = {}) {
  FolderWriter writer(name, 7);
  writer.normal("model.embed_tokens.weight", {s.vocab, s.hidden}, 1.0f);
  for (int64_t i = 0; i < s.layers; ++i) {
    writer.decoder_layer("model.layers." + std::to_string(i) + ".", s, true);
  }
  writer.normal("model.norm.weight", {s.hidden}, 0.1f, 1.0f);
  return writer.finish(s, s.layers);
}

inline std::string write_tiny_drafter(const std::string& name, const TinySizes& s = {}) {
  FolderWriter writer(name, 8);
  writer.normal("fc.weight", {s.hidden, 2 * s.hidden}, 0.1f);
  writer.normal("fc.bias", {s.hidden}, 0.1f);
  writer.decoder_layer("layers.0.", s, false);
  return writer.finish(s, 1);
}

}  // namespace frspec::test
