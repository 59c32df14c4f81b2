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

#include "file_fixtures.h"

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

// Where all of them are: a folder of this process, gone when it ends.
inline const TempFolder& tiny_models() {
  static const TempFolder folder;
  return folder;
}

class FolderWriter {
 public:
  explicit FolderWriter(const std::string& name, uint32_t seed)
      : folder_(tiny_models().path(name)), random_(seed) {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }

  std::vector<float> normal(const std::string& name, const std::vector<int64_t>& shape, float scale,
                            float mean = 0.0f) {
    std::vector<float> values = random(shape, scale, mean);
    tensor(name, shape, values);
    return values;
  }

  // The values that normal() would write.
  std::vector<float> random(const std::vector<int64_t>& shape, float scale, float mean = 0.0f) {
    std::normal_distribution<float> noise(mean, scale);
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = noise(random_);
    return values;
  }

  void tensor(const std::string& name, const std::vector<int64_t>& shape,
              const std::vector<float>& values) {
    const size_t begin = bytes_.size();
    bytes_.resize(begin + values.size() * sizeof(float));
    std::memcpy(bytes_.data() + begin, values.data(), values.size() * sizeof(float));
    header_[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, bytes_.size()}}};
  }

  void decoder_layer(const std::string& prefix, const TinySizes& s, bool input_norm,
                     float strength = 1.0f) {
    const float scale = strength / std::sqrt(static_cast<float>(s.hidden));
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

  std::string finish(const TinySizes& s, int64_t layers, bool tied = true) {
    write_config(s, layers, tied);
    return finish();
  }

  std::string finish(const nlohmann::json& config) {
    std::ofstream(folder_ / "config.json") << config.dump();
    return finish();
  }

  // No tensors: random weights (runtime/synthetic.h).
  std::string finish_synthetic(const TinySizes& s, int64_t layers) {
    write_config(s, layers, false, {{"frspec_synthetic_seed", 1}, {"torch_dtype", "bfloat16"}});
    return folder_.string();
  }

 private:
  std::string finish() {
    std::string header = header_.dump();
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const uint64_t size = header.size();
    std::ofstream file(folder_ / "model.safetensors", std::ios::binary);
    file.write(reinterpret_cast<const char*>(&size), sizeof(size));
    file << header;
    file.write(bytes_.data(), static_cast<std::streamsize>(bytes_.size()));
    return folder_.string();
  }

  void write_config(const TinySizes& s, int64_t layers, bool tied,
                    const nlohmann::json& more = nlohmann::json::object()) {
    nlohmann::json config = {{"architectures", {"LlamaForCausalLM"}},
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
                             {"tie_word_embeddings", tied},
                             {"hidden_act", "silu"},
                             {"eos_token_id", 1},
                             {"torch_dtype", "float32"}};
    config.update(more);
    std::ofstream(folder_ / "config.json") << config.dump();
  }

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

inline std::string write_synthetic(const std::string& name, const TinySizes& s, int64_t layers) {
  return FolderWriter(name, 1).finish_synthetic(s, layers);
}

// A target that mostly goes from token t to token 3 t + 1 (mod the vocabulary), and a drafter that
// knows: drafts are accepted now and then, at temperature 1 too.
inline std::string write_predictable_target(const std::string& name, const TinySizes& s) {
  FolderWriter writer(name, 7);
  const auto embedding = writer.normal("model.embed_tokens.weight", {s.vocab, s.hidden}, 1.0f);
  for (int64_t i = 0; i < s.layers; ++i) {
    writer.decoder_layer("model.layers." + std::to_string(i) + ".", s, true, 0.4f);
  }
  writer.normal("model.norm.weight", {s.hidden}, 0.1f, 1.0f);
  std::vector<float> head(embedding.size());
  for (int64_t token = 0; token < s.vocab; ++token) {
    const int64_t next = (3 * token + 1) % s.vocab;
    for (int64_t i = 0; i < s.hidden; ++i) {
      head[static_cast<size_t>(next * s.hidden + i)] =
          0.1f * embedding[static_cast<size_t>(token * s.hidden + i)];
    }
  }
  writer.tensor("lm_head.weight", {s.vocab, s.hidden}, head);
  return writer.finish(s, s.layers, false);
}

inline std::string write_predictable_drafter(const std::string& name, const TinySizes& s) {
  FolderWriter writer(name, 8);
  std::vector<float> fc(static_cast<size_t>(2 * s.hidden * s.hidden), 0.0f);
  for (int64_t i = 0; i < s.hidden; ++i) fc[static_cast<size_t>(i * 2 * s.hidden + i)] = 1.0f;
  writer.tensor("fc.weight", {s.hidden, 2 * s.hidden}, fc);
  writer.decoder_layer("layers.0.", s, false, 0.4f);
  return writer.finish(s, 1);
}

// Medusa heads in the layout of FasterDecoding/Medusa.
struct TinyMedusa {
  int64_t heads = 4;
  int64_t layers = 1;
  std::string prefix;         // of the tensors' names
  int64_t claimed_heads = 0;  // by the config; 0: as many as there are
};

// The folder of heads whose LM heads lm_head(h) gives.
template <typename LmHead>
std::string write_medusa(FolderWriter& writer, const TinySizes& s, const TinyMedusa& medusa,
                         const LmHead& lm_head) {
  const float scale = 0.3f / std::sqrt(static_cast<float>(s.hidden));
  for (int64_t h = 0; h < medusa.heads; ++h) {
    const std::string head = medusa.prefix + std::to_string(h) + ".";
    for (int64_t layer = 0; layer < medusa.layers; ++layer) {
      const std::string block = head + std::to_string(layer) + ".linear.";
      writer.normal(block + "weight", {s.hidden, s.hidden}, scale);
      writer.normal(block + "bias", {s.hidden}, 0.1f);
    }
    writer.tensor(head + std::to_string(medusa.layers) + ".weight", {s.vocab, s.hidden},
                  lm_head(h));
  }
  const int64_t claimed = medusa.claimed_heads == 0 ? medusa.heads : medusa.claimed_heads;
  return writer.finish({{"medusa_num_heads", claimed},
                        {"medusa_num_layers", medusa.layers},
                        {"base_model_name_or_path", "somebody/model"}});
}

inline std::string write_tiny_medusa(const std::string& name, const TinySizes& s = {},
                                     const TinyMedusa& medusa = {}) {
  FolderWriter writer(name, 9);
  return write_medusa(writer, s, medusa, [&](int64_t) {
    return writer.random({s.vocab, s.hidden}, 0.3f);
  });
}

// Heads that know the predictable target: from the feature after token t, head h expects the token
// that comes h + 2 steps of t to 3 t + 1 later.
inline std::string write_predictable_medusa(const std::string& name, const TinySizes& s,
                                            const TinyMedusa& medusa = {}) {
  const auto embedding = FolderWriter(name, 7).random({s.vocab, s.hidden}, 1.0f);
  FolderWriter writer(name, 9);
  return write_medusa(writer, s, medusa, [&](int64_t h) {
    std::vector<float> head(embedding.size());
    for (int64_t token = 0; token < s.vocab; ++token) {
      int64_t next = token;
      for (int64_t step = 0; step < h + 2; ++step) next = (3 * next + 1) % s.vocab;
      for (int64_t i = 0; i < s.hidden; ++i) {
        head[static_cast<size_t>(next * s.hidden + i)] =
            0.1f * embedding[static_cast<size_t>(token * s.hidden + i)];
      }
    }
    return head;
  });
}

// A ranking of all token ids, each third one first.
inline std::string write_tiny_ranking(const std::string& name, int64_t vocab) {
  const std::filesystem::path path = tiny_models().path(name + ".safetensors");
  std::vector<int32_t> tokens;
  for (int64_t first = 0; first < 3; ++first) {
    for (int64_t token = first; token < vocab; token += 3) {
      tokens.push_back(static_cast<int32_t>(token));
    }
  }
  std::vector<int64_t> counts(tokens.size());
  for (size_t i = 0; i < counts.size(); ++i) counts[i] = static_cast<int64_t>(counts.size() - i);
  const size_t count_bytes = counts.size() * sizeof(int64_t);
  const size_t token_bytes = tokens.size() * sizeof(int32_t);
  const nlohmann::json header = {
      {"__metadata__",
       {{"format", "frspec-ranking"},
        {"version", "1"},
        {"tokenizer_fingerprint", ""},
        {"special_ids", "[]"},
        {"vocab_size", std::to_string(vocab)},
        {"corpus", "made up"},
        {"tokens_counted", "1"}}},
      {"counts", {{"dtype", "I64"}, {"shape", {vocab}}, {"data_offsets", {0, count_bytes}}}},
      {"token_ids",
       {{"dtype", "I32"},
        {"shape", {vocab}},
        {"data_offsets", {count_bytes, count_bytes + token_bytes}}}}};
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t size = text.size();
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&size), sizeof(size));
  file << text;
  file.write(reinterpret_cast<const char*>(counts.data()),
             static_cast<std::streamsize>(count_bytes));
  file.write(reinterpret_cast<const char*>(tokens.data()),
             static_cast<std::streamsize>(token_bytes));
  return path.string();
}

}  // namespace frspec::test
