#include "llama.h"

#include <algorithm>
#include <cmath>

namespace frspec {

namespace {
constexpr int64_t kRopeUploadRows = 1024;
}

void LayerWorkspace::layout(const Backend& backend, Arena& arena, const char* plan_name,
                            DType weight_dtype, const ModelConfig& config, int64_t rows) {
  const DType dtype = backend.activation_dtype(weight_dtype);
  const auto input = [&](int64_t cols) {
    const int64_t stride = (cols + 1) / 2 * 2;
    return arena.take_tensor(plan_name, backend.input_dtype(weight_dtype), rows, stride)
        .col_slice(0, cols);
  };
  const int64_t qkv_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
  hidden = arena.take_tensor(plan_name, dtype, rows, config.hidden_size);
  normed = input(config.hidden_size);
  qkv = arena.take_tensor(plan_name, dtype, rows, qkv_width);
  attended = input(config.num_heads * config.head_dim);
  ffn = input(config.intermediate_size);
}

DecoderLayer read_decoder_layer(WeightReader& reader, const ModelConfig& config,
                                const std::string& prefix, bool with_input_norm) {
  const int64_t hidden = config.hidden_size;
  const int64_t q_rows = config.num_heads * config.head_dim;
  const int64_t kv_rows = config.num_kv_heads * config.head_dim;
  const std::string attention = prefix + "self_attn.";
  const std::string mlp = prefix + "mlp.";
  DecoderLayer layer;
  if (with_input_norm) layer.input_norm = reader.vector(prefix + "input_layernorm.weight", hidden);
  layer.qkv = reader.linear({{attention + "q_proj", q_rows},
                             {attention + "k_proj", kv_rows},
                             {attention + "v_proj", kv_rows}},
                            hidden, config.qkv_bias);
  layer.o = reader.linear({{attention + "o_proj", hidden}}, q_rows, config.o_bias);
  layer.post_attention_norm = reader.vector(prefix + "post_attention_layernorm.weight", hidden);
  layer.gate =
      reader.linear({{mlp + "gate_proj", config.intermediate_size}}, hidden, config.mlp_bias);
  layer.up = reader.linear({{mlp + "up_proj", config.intermediate_size}}, hidden, config.mlp_bias);
  layer.down =
      reader.linear({{mlp + "down_proj", hidden}}, config.intermediate_size, config.mlp_bias);
  return layer;
}

void raise_limits(WorkspaceLimits& limits, const ModelConfig& config) {
  const auto raise_to = [](int64_t& limit, int64_t value) { limit = std::max(limit, value); };
  const int64_t q_width = config.num_heads * config.head_dim;
  const int64_t kv_width = config.num_kv_heads * config.head_dim;
  raise_to(limits.query_heads, config.num_heads);
  raise_to(limits.head_dim, config.head_dim);
  raise_to(limits.group_heads, config.num_heads / config.num_kv_heads);
  raise_to(limits.in_features, std::max({config.hidden_size, q_width, config.intermediate_size}));
  raise_to(limits.out_features,
           std::max({config.hidden_size, q_width + 2 * kv_width, config.intermediate_size}));
  raise_to(limits.ffn_features, config.intermediate_size);
}

void forward_layer(Backend& backend, const ModelConfig& config, const DecoderLayer& layer,
                   const KvLayer& kv, const Tensor& rope, const Pass& pass,
                   const LayerWorkspace& workspace) {
  const Tensor hidden = workspace.hidden.row_slice(0, pass.rows);
  const Tensor normed = workspace.normed.row_slice(0, pass.rows);
  const Tensor qkv = workspace.qkv.row_slice(0, pass.rows);
  const Tensor attended = workspace.attended.row_slice(0, pass.rows);
  const Tensor ffn = workspace.ffn.row_slice(0, pass.rows);
  const Tensor q = qkv.col_slice(0, config.num_heads * config.head_dim);

  if (layer.input_norm != nullptr) {
    backend.rms_norm(normed, hidden, layer.input_norm, config.rms_norm_eps);
  }
  backend.linear(qkv, layer.input_norm != nullptr ? normed : hidden, layer.qkv, pass.kind);
  backend.rope_and_append(qkv, kv, rope, pass.positions, pass.slots);
  backend.attention(attended, q, kv, pass.visible, pass.kind);
  backend.linear(hidden, attended, layer.o, pass.kind, &hidden);

  backend.rms_norm(normed, hidden, layer.post_attention_norm, config.rms_norm_eps);
  backend.linear_swiglu(ffn, normed, layer.gate, layer.up, pass.kind);
  backend.linear(hidden, ffn, layer.down, pass.kind, &hidden);
}

Tensor layout_rope(Backend& backend, Arena& arena, const char* plan_name, const ModelConfig& config,
                   int64_t positions) {
  const int64_t half = config.head_dim / 2;
  const Tensor rope = arena.take_tensor(plan_name, DType::kF32, positions, config.head_dim);
  if (arena.planning()) return rope;
  const std::vector<double> frequencies = rope_inverse_frequencies(config);
  std::vector<float> block(static_cast<size_t>(kRopeUploadRows * config.head_dim));
  for (int64_t first = 0; first < positions; first += kRopeUploadRows) {
    const int64_t count = std::min(kRopeUploadRows, positions - first);
    for (int64_t p = 0; p < count; ++p) {
      float* row = block.data() + p * config.head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(first + p) * frequencies[static_cast<size_t>(i)];
        row[i] = static_cast<float>(std::cos(angle));
        row[half + i] = static_cast<float>(std::sin(angle));
      }
    }
    backend.upload(rope.row<float>(first), block.data(),
                   static_cast<size_t>(count * config.head_dim) * sizeof(float));
  }
  return rope;
}

void Llama::layout(Backend& backend, Arena& arena, Checkpoint* checkpoint, DType dtype,
                   int64_t slots, int64_t positions, int64_t rows) {
  WeightReader reader(backend, arena, checkpoint, config.synthetic_seed, dtype, kWeights);
  const WeightReader::Part embedding_part{"model.embed_tokens", config.vocab_size};
  embedding = reader.linear({embedding_part}, config.hidden_size, false);
  layers_.clear();
  for (int64_t index = 0; index < config.num_layers; ++index) {
    layers_.push_back(
        read_decoder_layer(reader, config, concat("model.layers.", index, "."), true));
  }
  if (checkpoint != nullptr) {
    checkpoint->check_all_used(
        "model.layers.",
        concat("the model that config.json describes (num_hidden_layers ", config.num_layers, ")"));
  }
  final_norm_ = reader.vector("model.norm.weight", config.hidden_size);
  head = config.tie_word_embeddings
             ? embedding
             : reader.linear({{"lm_head", config.vocab_size}}, config.hidden_size, false);

  kv.layout(backend, arena, "target KV cache", config, dtype, slots);
  rope_ = layout_rope(backend, arena, "RoPE tables", config, positions);
  workspace_.layout(backend, arena, "target activations", dtype, config, rows);
}

void Llama::forward(Backend& backend, const Pass& pass, const Tensor& features) const {
  const Tensor hidden = workspace_.hidden.row_slice(0, pass.rows);
  backend.embed(hidden, embedding, pass.tokens);
  for (size_t index = 0; index < layers_.size(); ++index) {
    forward_layer(backend, config, layers_[index], kv.layers[index], rope_, pass, workspace_);
  }
  backend.rms_norm(features, hidden, final_norm_, config.rms_norm_eps);
}

}  // namespace frspec
