// What config.json says of a model: sizes, normalisation, RoPE and end tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace frspec {

constexpr int64_t kMaxHeadDim = 256;  // of the attention of every backend

struct RopeScaling {
  enum class Kind : uint8_t { kNone, kLinear, kLlama3 };
  Kind kind = Kind::kNone;
  double factor = 1.0;
  double low_freq_factor = 1.0;       // llama3 only
  double high_freq_factor = 4.0;      // llama3 only
  int64_t original_max_position = 0;  // llama3 only
};

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM", "MistralForCausalLM" or "Qwen2ForCausalLM"
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;                   // q, k and v projections
  bool o_bias = false;                     // attention output projection
  bool mlp_bias = false;                   // gate, up and down projections
  std::optional<DType> dtype;              // what the checkpoint says it is stored in
  std::vector<int32_t> eos_token_ids;      // in the file's order, without duplicates; may be empty
  std::optional<uint64_t> synthetic_seed;  // random weights instead of tensors (synthetic.h)
};

// Reads config.json (and generation_config.json for the end tokens). Keys that are absent take
// Hugging Face's defaults. ModelError names the file and the key, what was expected and found; also
// for an architecture or a RoPE scaling that the forward pass does not have.
ModelConfig read_model_config(const std::string& folder);

// Reads an EAGLE drafter's config.json: the same keys; `architectures` may be absent or name
// LlamaForCausalLM, vocab_size and max_position_embeddings too may be absent (0 then). Whether `fc`
// and the projections have biases is for the checkpoint to say, so `qkv_bias` and the like hold
// only what the config claims.
ModelConfig read_eagle_config(const std::string& folder);

// A Medusa checkpoint's config.json. What it leaves out is 0.
struct MedusaConfig {
  int64_t num_heads = 0;   // published files claim fewer than their checkpoint holds
  int64_t num_layers = 0;  // residual blocks of each head
  int64_t hidden_size = 0;
  int64_t vocab_size = 0;
  std::optional<uint64_t> synthetic_seed;
};

// None for a drafter of another kind: a config without medusa_num_heads. ModelError as above.
std::optional<MedusaConfig> read_medusa_config(const std::string& folder);

// bf16/bfloat16, fp16/float16/half, fp32/float32; RequestError otherwise.
DType parse_dtype(const std::string& name);

// Angle per position of each rotated pair, [head_dim / 2], with the config's scaling applied.
// rope_theta^(-2 i / head_dim); linear: divided by factor (Hugging Face's modeling_rope_utils);
// llama3: Llama 3.1's frequency-dependent interpolation, as in the same module.
std::vector<double> rope_inverse_frequencies(const ModelConfig& config);

}  // namespace frspec
