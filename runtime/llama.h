// The forward pass of every target (Llama 2/3, SmolLM2, Mistral, Qwen2) and, layer by layer, of the
// drafters that are made of the same decoder layer.
#pragma once

#include <vector>

#include "arena.h"
#include "backend.h"
#include "checkpoint.h"
#include "config.h"
#include "kv_cache.h"
#include "weights.h"

namespace frspec {

struct DecoderLayer {
  const float* input_norm =
      nullptr;  // [d]; null: the layer takes its input as it is (EAGLE's first)
  const float* post_attention_norm = nullptr;  // [d]
  LinearWeight qkv;                            // [(H + 2 K) D, d], rows q, k, v
  LinearWeight o;                              // [d, H D]
  LinearWeight gate;                           // [f, d]
  LinearWeight up;                             // [f, d]
  LinearWeight down;                           // [d, f]
};

// What the rows of one pass are and where they go. Arrays in backend memory.
struct Pass {
  Rows kind = Rows::kTarget;
  int64_t rows = 0;                    // n
  const int32_t* tokens = nullptr;     // [n]
  const int32_t* positions = nullptr;  // [n] logical positions, for RoPE
  const int32_t* slots = nullptr;      // [n] where keys and values are appended
  Visible visible;
};

// Activations of a pass of at most `rows` rows.
struct LayerWorkspace {
  Tensor hidden;  // [rows, d] the residual stream
  Tensor qkv;     // [rows, (H + 2 K) D]
  // What only products read, in Backend::input_dtype().
  Tensor normed;    // [rows, d]
  Tensor attended;  // [rows, H D]
  Tensor ffn;       // [rows, f]

  void layout(const Backend& backend, Arena& arena, const char* plan_name, DType weight_dtype,
              const ModelConfig& config, int64_t rows);
};

// prefix: "model.layers.3." of the tensor names.
DecoderLayer read_decoder_layer(WeightReader& reader, const ModelConfig& config,
                                const std::string& prefix, bool with_input_norm);

// Raises the limits to what forward_layer asks for, rows and length aside.
void raise_limits(WorkspaceLimits& limits, const ModelConfig& config);

// workspace.hidden [n, d] in, out: one decoder layer.
void forward_layer(Backend& backend, const ModelConfig& config, const DecoderLayer& layer,
                   const KvLayer& kv, const Tensor& rope, const Pass& pass,
                   const LayerWorkspace& workspace);

// cos and sin of every position [positions, D] (see Backend::rope_and_append).
Tensor layout_rope(Backend& backend, Arena& arena, const char* plan_name, const ModelConfig& config,
                   int64_t positions);

class Llama {
 public:
  static constexpr const char* kWeights = "target weights";  // their name in the memory plan

  ModelConfig config;
  LinearWeight embedding;  // [V, d]
  LinearWeight head;       // [V, d]; the embedding itself when they are tied
  KvCache kv;

  // slots of the KV cache, positions of the RoPE table, rows of the largest pass.
  void layout(Backend& backend, Arena& arena, Checkpoint* checkpoint, DType dtype, int64_t slots,
              int64_t positions, int64_t rows);

  // features [n, d]: the hidden states after the final norm, which the head and the drafters read.
  void forward(Backend& backend, const Pass& pass, const Tensor& features) const;

 private:
  std::vector<DecoderLayer> layers_;
  const float* final_norm_ = nullptr;  // [d]
  Tensor rope_;
  LayerWorkspace workspace_;
};

}  // namespace frspec
