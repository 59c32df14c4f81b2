#include "medusa.h"

#include <algorithm>
#include <utility>

#include "check.h"
#include "llama.h"
#include "weights.h"

namespace frspec {

namespace {

constexpr const char* kBuffers = "drafter activations";

// A checkpoint of heads alone names them 0, 1, ...; one of a whole model has them under this.
constexpr const char* kWholeModelPrefix = "medusa_head.";

std::string block_name(const std::string& prefix, int64_t head, int64_t layer) {
  return concat(prefix, head, ".", layer, ".linear");
}

std::string lm_head_name(const std::string& prefix, int64_t head, int64_t layers) {
  return concat(prefix, head, ".", layers);
}

// How many heads the checkpoint holds, which may be more than its config claims: the published
// config.json files say 2 where there are 5.
int64_t count_heads(const Checkpoint& checkpoint, const std::string& prefix,
                    const MedusaConfig& config) {
  const std::string& folder = checkpoint.folder();
  int64_t layers = 0;
  while (checkpoint.contains(block_name(prefix, 0, layers) + ".weight")) ++layers;
  FRSPEC_CHECK(layers == config.num_layers, ModelError, folder,
               ": expected medusa_num_layers residual blocks in a head, ", config.num_layers,
               ", found ", layers);
  int64_t heads = 0;
  while (checkpoint.contains(lm_head_name(prefix, heads, layers) + ".weight")) ++heads;
  FRSPEC_CHECK(heads >= config.num_heads, ModelError, folder, ": expected medusa_num_heads heads, ",
               config.num_heads, ", found ", heads, ": there is no tensor ",
               lm_head_name(prefix, heads, layers), ".weight");
  return heads;
}

}  // namespace

Medusa::Medusa(const std::string& folder, const MedusaConfig& config, const ModelConfig& target,
               std::vector<int32_t> sub_vocab, const TreeShape& shape,
               const MedusaTreeOptions& tree_options)
    : config_(config),
      vocab_size_(target.vocab_size),
      sub_vocab_(std::move(sub_vocab)),
      min_probability_(tree_options.paths.empty() ? shape.min_probability : 0.0) {
  check_draft_sizes(folder, config_.hidden_size, config_.vocab_size, target);
  int64_t heads = config_.num_heads;
  if (!config_.synthetic_seed) {
    checkpoint_ = std::make_unique<Checkpoint>(folder);
    for (const std::string& name : checkpoint_->names()) {
      if (name.starts_with(kWholeModelPrefix)) prefix_ = kWholeModelPrefix;
    }
    heads = count_heads(*checkpoint_, prefix_, config_);
  }
  heads = std::min<int64_t>(heads, kMaxTreeDepth);
  plan_ = plan_medusa_tree(tree_options, shape, heads, head_width());
  limits_ = score_limits(min_probability_);
}

int64_t Medusa::head_width() const {
  return sub_vocab_.empty() ? vocab_size_ : static_cast<int64_t>(sub_vocab_.size());
}

void Medusa::raise(WorkspaceLimits& limits, int64_t) const {
  limits.round_rows = std::max<int64_t>(limits.round_rows, plan_.depth);
  limits.beam_rows = std::max<int64_t>({limits.beam_rows, plan_.depth, plan_.width});
}

void Medusa::layout(Backend& backend, Arena& arena, const Llama& target, int64_t, int64_t) {
  const DType dtype = target.head.dtype;
  const int64_t hidden = target.config.hidden_size;
  const int64_t width = head_width();
  WeightReader block_reader(backend, arena, checkpoint_.get(), config_.synthetic_seed, dtype,
                            "drafter weights");
  WeightReader head_reader(backend, arena, checkpoint_.get(), config_.synthetic_seed, dtype,
                           "draft head");
  heads_.assign(static_cast<size_t>(plan_.depth), {});
  for (int64_t h = 0; h < plan_.depth; ++h) {
    Head& head = heads_[static_cast<size_t>(h)];
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      const std::string name = block_name(prefix_, h, layer);
      head.blocks.push_back(
          block_reader.linear({{name, hidden}}, hidden, block_reader.contains(name + ".bias")));
    }
    const std::string name = lm_head_name(prefix_, h, config_.num_layers);
    head.lm_head = sub_vocab_.empty()
                       ? head_reader.linear({{name, vocab_size_}}, hidden, false)
                       : head_reader.chosen_rows(name, vocab_size_, hidden, sub_vocab_);
  }
  column_tokens_ = nullptr;
  if (!sub_vocab_.empty()) {
    column_tokens_ = arena.take_array<int32_t>("draft head", sub_vocab_.size());
  }

  const DType activations = backend.activation_dtype(dtype);
  feature_ = arena.take_tensor(kBuffers, activations, 1, hidden);
  hidden_ = arena.take_tensor(kBuffers, activations, plan_.depth, hidden);
  product_ = arena.take_tensor(kBuffers, activations, plan_.depth, hidden);
  logits_ = arena.take_tensor("draft logits", DType::kF32, plan_.depth, width);
  feature_rows_ = arena.take_array<int32_t>(kBuffers, static_cast<size_t>(plan_.depth));
  const auto candidates = static_cast<size_t>(plan_.depth * plan_.width);
  logprobs_ = arena.take_array<float>(kBuffers, candidates);
  candidate_tokens_ = arena.take_array<int32_t>(kBuffers, candidates);
  auto* parents = arena.take_array<int32_t>(kBuffers, plan_.parents.size());
  auto* sources = arena.take_array<int32_t>(kBuffers, plan_.candidates.size());
  shape_ = {parents, sources};
  if (min_probability_ > 0.0) {
    scores_ = arena.take_array<float>(kBuffers, plan_.parents.size());
    numbers_ = arena.take_array<int32_t>(kBuffers, plan_.parents.size());
    likely_parents_ = arena.take_array<int32_t>(kBuffers, plan_.parents.size());
    likely_candidates_ = arena.take_array<int32_t>(kBuffers, plan_.parents.size());
  }
  if (arena.planning()) return;
  const auto upload = [&](int32_t* to, const std::vector<int32_t>& from) {
    backend.upload(to, from.data(), from.size() * sizeof(int32_t));
  };
  if (column_tokens_ != nullptr) upload(column_tokens_, sub_vocab_);
  upload(feature_rows_, std::vector<int32_t>(static_cast<size_t>(plan_.depth), 0));
  upload(parents, plan_.parents);
  upload(sources, plan_.candidates);
}

void Medusa::observe(Backend& backend, const Tensor& features, const int32_t* rows, const int32_t*,
                     const int32_t*, int64_t n, int64_t, StageMarks& marks) {
  backend.gather_rows(feature_, features, rows + n - 1);
  marks.mark(DraftStage::kLayers);
}

void Medusa::score(Backend& backend, int64_t first, int64_t count, StageMarks& marks) {
  const auto head = [&](int64_t h) -> const Head& { return heads_[static_cast<size_t>(h)]; };
  backend.gather_rows(hidden_.row_slice(first, count), feature_, feature_rows_);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    for (int64_t h = first; h < first + count; ++h) {
      backend.linear(product_.row_slice(h, 1), hidden_.row_slice(h, 1),
                     head(h).blocks[static_cast<size_t>(layer)], Rows::kDraft);
    }
    backend.add_silu(hidden_.row_slice(first, count), product_.row_slice(first, count));
  }
  marks.mark(DraftStage::kLayers);
  for (int64_t h = first; h < first + count; ++h) {
    backend.linear(logits_.row_slice(h, 1), hidden_.row_slice(h, 1), head(h).lm_head, Rows::kDraft);
  }
  marks.mark(DraftStage::kHead);
  const int64_t candidates = first * plan_.width;
  backend.topk_logprobs(logprobs_ + candidates, candidate_tokens_ + candidates,
                        logits_.row_slice(first, count), column_tokens_, plan_.width);
  marks.mark(DraftStage::kTopk);
}

int64_t Medusa::score_while_likely(Backend& backend, StageMarks& marks) {
  float best = 0.0f;  // score of the level's best path, on which every head has its first choice
  int64_t scored = 0;
  while (scored < plan_.depth && (scored == 0 || best >= limits_.level)) {
    score(backend, scored, 1, marks);
    best += logprobs_[scored * plan_.width];
    ++scored;
  }
  return scored;
}

int32_t Medusa::keep_likely_nodes(int64_t scored) {
  scores_[0] = 0.0f;
  numbers_[0] = 0;
  likely_parents_[0] = -1;
  likely_candidates_[0] = 0;
  int32_t kept = 1;
  for (size_t node = 1; node < plan_.parents.size(); ++node) {
    numbers_[node] = -1;
    const int32_t parent = plan_.parents[node];
    const int32_t candidate = plan_.candidates[node];
    if (numbers_[parent] < 0 || candidate >= scored * plan_.width) continue;
    scores_[node] = scores_[parent] + logprobs_[candidate];
    if (!(scores_[node] >= limits_.node)) continue;  // nor what is no number
    likely_parents_[kept] = numbers_[parent];
    likely_candidates_[kept] = candidate;
    numbers_[node] = kept++;
  }
  return kept;
}

int32_t Medusa::draft(Backend& backend, const DraftTree& tree, const TreeRoot& root, int64_t,
                      StageMarks& marks) {
  DraftTree built = tree;
  StaticTree shape = shape_;
  if (min_probability_ > 0.0) {
    built.nodes = keep_likely_nodes(score_while_likely(backend, marks));
    shape = {likely_parents_, likely_candidates_};
  } else if (plan_.depth > 0) {
    score(backend, 0, plan_.depth, marks);
  }
  backend.build_static_tree(built, shape, candidate_tokens_, root);
  marks.mark(DraftStage::kTree);
  return built.nodes;
}

}  // namespace frspec
