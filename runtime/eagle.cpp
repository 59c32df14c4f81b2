#include "eagle.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace frspec {

namespace {

constexpr const char* kBuffers = "drafter activations";

// What the checkpoint holds decides over what a drafter's config claims.
void read_biases(const Checkpoint& checkpoint, ModelConfig& config) {
  config.qkv_bias = checkpoint.contains("layers.0.self_attn.q_proj.bias");
  config.o_bias = checkpoint.contains("layers.0.self_attn.o_proj.bias");
  config.mlp_bias = checkpoint.contains("layers.0.mlp.gate_proj.bias");
}

}  // namespace

Eagle::Eagle(const std::string& folder, const ModelConfig& target, std::vector<int32_t> sub_vocab,
             const TreeShape& shape)
    : config_(read_eagle_config(folder)), shape_(shape), sub_vocab_(std::move(sub_vocab)) {
  check_draft_sizes(folder, config_.hidden_size, config_.vocab_size, target);
  config_.vocab_size = target.vocab_size;
  if (!config_.synthetic_seed) {
    checkpoint_ = std::make_unique<Checkpoint>(folder);
    FRSPEC_CHECK(
        checkpoint_->contains("fc.weight") || !checkpoint_->contains("model.embed_tokens.weight"),
        ModelError, folder, ": expected an EAGLE or Medusa drafter, found a whole model");
    read_biases(*checkpoint_, config_);
  }
  topk_ = static_cast<int>(std::min<int64_t>(shape_.topk, head_width()));
  limits_ = score_limits(shape_.min_probability);
}

int64_t Eagle::head_width() const {
  return sub_vocab_.empty() ? config_.vocab_size : static_cast<int64_t>(sub_vocab_.size());
}

void Eagle::raise(WorkspaceLimits& limits, int64_t max_context) const {
  const auto raise_to = [](int64_t& limit, int64_t value) { limit = std::max(limit, value); };
  raise_limits(limits, config_);
  raise_to(limits.rows, topk_);
  raise_to(limits.round_rows, topk_);
  raise_to(limits.beam_rows, topk_);
  raise_to(limits.visible, max_context + int64_t{shape_.depth} * topk_);
  raise_to(limits.in_features, 2 * config_.hidden_size);
}

void Eagle::layout(Backend& backend, Arena& arena, const Llama& target, int64_t slots,
                   int64_t observed_rows) {
  const DType dtype = target.head.dtype;
  const int64_t hidden = config_.hidden_size;
  WeightReader reader(backend, arena, checkpoint_.get(), config_.synthetic_seed, dtype,
                      "drafter weights");
  fc_ = reader.linear({{"fc", hidden}}, 2 * hidden, reader.contains("fc.bias"));
  layers_.clear();
  for (int64_t index = 0; index < config_.num_layers; ++index) {
    // The first layer reads fc's output without a norm (EAGLE, arXiv 2401.15077, section 4.1).
    layers_.push_back(
        read_decoder_layer(reader, config_, concat("layers.", index, "."), index > 0));
  }
  embedding_ = target.embedding;
  if (reader.contains("embed_tokens.weight")) {
    embedding_ = reader.linear({{"embed_tokens", config_.vocab_size}}, hidden, false);
  }
  if (checkpoint_ != nullptr) {
    checkpoint_->check_all_used(
        "", concat("an EAGLE v1 or v2 drafter of num_hidden_layers ", config_.num_layers,
                   ", the first without an input norm"));
  }

  head_ = target.head;
  column_tokens_ = nullptr;
  if (!sub_vocab_.empty()) {
    const int64_t width = head_width();
    head_.out_features = width;
    head_.data = arena.take("draft head", backend.linear_bytes(head_.dtype, width, hidden));
    column_tokens_ = arena.take_array<int32_t>("draft head", sub_vocab_.size());
    if (!arena.planning()) {
      backend.gather_linear(head_, target.head, sub_vocab_.data());
      backend.upload(column_tokens_, sub_vocab_.data(), sub_vocab_.size() * sizeof(int32_t));
    }
  }

  const int64_t in_flight = int64_t{shape_.depth} * topk_;
  const DType activations = backend.activation_dtype(dtype);
  const int64_t rows = std::max<int64_t>(observed_rows, topk_);
  kv_.layout(backend, arena, "drafter KV cache", config_, dtype, slots + in_flight);
  rope_ = layout_rope(backend, arena, "RoPE tables", config_, slots + shape_.depth);
  workspace_.layout(backend, arena, kBuffers, dtype, config_, rows);
  concat_ = arena.take_tensor(kBuffers, activations, rows, 2 * hidden);
  last_hidden_ = arena.take_tensor(kBuffers, activations, 1, hidden);
  logits_ = arena.take_tensor("draft logits", DType::kF32, topk_, head_width());
  const auto candidates = static_cast<size_t>(topk_ * topk_);
  logprobs_ = arena.take_array<float>(kBuffers, candidates);
  candidate_tokens_ = arena.take_array<int32_t>(kBuffers, candidates);

  pool_.capacity = pool_capacity(shape_.depth, topk_);
  pool_.tokens = arena.take_array<int32_t>(kBuffers, static_cast<size_t>(pool_.capacity));
  pool_.parents = arena.take_array<int32_t>(kBuffers, static_cast<size_t>(pool_.capacity));
  pool_.scores = arena.take_array<float>(kBuffers, static_cast<size_t>(pool_.capacity));
  pool_.beam = arena.take_array<int32_t>(kBuffers, static_cast<size_t>(topk_));

  const auto beam = static_cast<size_t>(topk_);
  level_ = DraftLevel{};
  level_.topk = topk_;
  level_.logprobs = logprobs_;
  level_.tokens = candidate_tokens_;
  level_.row_tokens = arena.take_array<int32_t>(kBuffers, beam);
  level_.row_sources = arena.take_array<int32_t>(kBuffers, beam);
  level_.row_positions = arena.take_array<int32_t>(kBuffers, beam);
  level_.row_slots = arena.take_array<int32_t>(kBuffers, beam);
  level_.row_prefix = arena.take_array<int32_t>(kBuffers, beam);
  level_.ancestor_words = (in_flight + 63) / 64;
  level_.ancestors =
      arena.take_array<uint64_t>(kBuffers, static_cast<size_t>(in_flight * level_.ancestor_words));

  observed_positions_ = arena.take_array<int32_t>(kBuffers, static_cast<size_t>(observed_rows));
  observed_prefix_ = arena.take_array<int32_t>(kBuffers, static_cast<size_t>(observed_rows));
  row_index_ = arena.take_array<int32_t>(kBuffers, static_cast<size_t>(observed_rows));
  if (!arena.planning()) {
    std::vector<int32_t> index(static_cast<size_t>(observed_rows));
    std::iota(index.begin(), index.end(), 0);
    backend.upload(row_index_, index.data(), index.size() * sizeof(int32_t));
  }
}

int32_t Eagle::tree_nodes() const {
  return static_cast<int32_t>(
      std::min<int64_t>(shape_.tokens, 1 + pool_capacity(shape_.depth, topk_)));
}

void Eagle::forward(Backend& backend, const Pass& pass, StageMarks& marks) const {
  backend.linear(workspace_.hidden.row_slice(0, pass.rows), concat_.row_slice(0, pass.rows), fc_,
                 pass.kind);
  marks.mark(DraftStage::kEmbedding);
  for (size_t index = 0; index < layers_.size(); ++index) {
    forward_layer(backend, config_, layers_[index], kv_.layers[index], rope_, pass, workspace_);
  }
  marks.mark(DraftStage::kLayers);
}

void Eagle::observe(Backend& backend, const Tensor& features, const int32_t* rows,
                    const int32_t* next_tokens, const int32_t* end, int64_t n, int64_t length_bound,
                    StageMarks& marks) {
  const int64_t hidden = config_.hidden_size;
  backend.number_rows(observed_positions_, observed_prefix_, end, n);
  const Tensor input = concat_.row_slice(0, n);
  backend.embed(input.col_slice(0, hidden), embedding_, next_tokens);
  backend.gather_rows(input.col_slice(hidden, hidden), features, rows);
  Pass pass;
  pass.kind = Rows::kDraft;
  pass.rows = n;
  pass.positions = observed_positions_;
  pass.slots = observed_positions_;
  pass.visible.prefix_length = observed_prefix_;
  pass.visible.max_length = length_bound;
  forward(backend, pass, marks);
  backend.gather_rows(last_hidden_, workspace_.hidden, row_index_ + n - 1);
}

void Eagle::expand(Backend& backend, int level, const Tensor& hidden, StageMarks& marks) {
  const Tensor logits = logits_.row_slice(0, hidden.rows);
  backend.linear(logits, hidden, head_, Rows::kDraft);
  marks.mark(DraftStage::kHead);
  backend.topk_logprobs(logprobs_, candidate_tokens_, logits, column_tokens_, topk_);
  marks.mark(DraftStage::kTopk);
  level_.level = level;
  level_.rows = static_cast<int>(hidden.rows);
  level_.first = candidates_;
  backend.expand_beam(pool_, level_);
  candidates_ += level_.rows * topk_;
  marks.mark(DraftStage::kTree);
}

int Eagle::likely_beam() const {
  if (shape_.min_probability == 0.0) return topk_;
  if (pool_.scores[pool_.beam[0]] < limits_.level) return 0;
  int count = 0;
  while (count < topk_ && is_likely(pool_.beam[count])) ++count;
  return count;
}

int32_t Eagle::likely_nodes(int32_t nodes) const {
  if (shape_.min_probability == 0.0) return nodes;
  int32_t count = 1;
  for (int32_t candidate = 0; candidate < candidates_ && count < nodes; ++candidate) {
    count += is_likely(candidate) ? 1 : 0;
  }
  return count;
}

int32_t Eagle::draft(Backend& backend, const DraftTree& tree, const TreeRoot& root,
                     int64_t length_bound, StageMarks& marks) {
  const int64_t hidden = config_.hidden_size;
  level_.committed = root.base;
  candidates_ = 0;
  expand(backend, 1, last_hidden_, marks);
  Tensor expanded = last_hidden_;
  for (int level = 2; level <= shape_.depth; ++level) {
    const int rows = likely_beam();
    if (rows == 0) break;
    const Tensor input = concat_.row_slice(0, rows);
    backend.embed(input.col_slice(0, hidden), embedding_, level_.row_tokens);
    backend.gather_rows(input.col_slice(hidden, hidden), expanded, level_.row_sources);
    Pass pass;
    pass.kind = Rows::kDraft;
    pass.rows = rows;
    pass.positions = level_.row_positions;
    pass.slots = level_.row_slots;
    pass.visible.prefix_length = level_.row_prefix;
    pass.visible.tree_base = root.base;
    pass.visible.ancestors = level_.ancestors + int64_t{level - 2} * topk_ * level_.ancestor_words;
    pass.visible.ancestor_words = level_.ancestor_words;
    pass.visible.max_length = length_bound;
    forward(backend, pass, marks);
    expanded = workspace_.hidden.row_slice(0, rows);
    expand(backend, level, expanded, marks);
  }
  DraftTree built = tree;
  built.nodes = likely_nodes(tree.nodes);
  DraftPool drafted = pool_;
  drafted.capacity = candidates_;
  backend.build_tree(built, drafted, root);
  marks.mark(DraftStage::kTree);
  return built.nodes;
}

}  // namespace frspec
