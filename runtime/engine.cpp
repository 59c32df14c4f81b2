#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "sub_vocab.h"

namespace frspec {

namespace {

// Rows of a prompt pass, where the backend does not say. Larger chunks are no faster, and their
// activations cost memory.
constexpr int64_t kPrefillRows = 512;
constexpr int64_t kDefaultContext = 4096;

class Stopwatch {
 public:
  // Seconds since the last call, or since construction.
  double lap() {
    const auto now = Clock::now();
    const double seconds = std::chrono::duration<double>(now - last_).count();
    last_ = now;
    return seconds;
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_ = Clock::now();
};

DType weight_dtype(const EngineOptions& options, const ModelConfig& config,
                   Checkpoint* checkpoint) {
  if (options.dtype) return parse_dtype(*options.dtype);
  if (checkpoint == nullptr) return config.dtype.value_or(DType::kBF16);
  return checkpoint->tensor("model.embed_tokens.weight").dtype;
}

void check_tree(const TreeShape& tree) {
  FRSPEC_CHECK(tree.depth >= 1 && tree.depth <= kMaxTreeDepth, RequestError,
               "tree depth must be 1 to ", kMaxTreeDepth, ", found ", tree.depth);
  FRSPEC_CHECK(tree.topk >= 1 && tree.topk <= kMaxTreeTopK, RequestError, "tree topk must be 1 to ",
               kMaxTreeTopK, ", found ", tree.topk);
  FRSPEC_CHECK(tree.tokens >= 1 && tree.tokens <= kMaxTreeNodes, RequestError,
               "tree tokens must be 1 to ", kMaxTreeNodes, ", found ", tree.tokens);
  FRSPEC_CHECK(tree.min_probability >= 0.0 && tree.min_probability < 1.0, RequestError,
               "tree min_probability must be in [0, 1), found ", tree.min_probability);
}

}  // namespace

Engine::Engine(const EngineOptions& options) : options_(options) {
  if (options.tree) check_tree(*options.tree);
  FRSPEC_CHECK(options.max_context >= 0, RequestError, "max_context must be positive, found ",
               options.max_context);
  FRSPEC_CHECK(options.drafter || !options.draft_vocab_size, RequestError,
               "vocab_size is the drafter's: it needs a drafter, found none");
  FRSPEC_CHECK(options.drafter || !options.medusa_tree, RequestError,
               "medusa_choices are the drafter's: they need a Medusa drafter, found none");
  FRSPEC_CHECK(options.ranking || !options.draft_vocab_size, RequestError, "vocab_size ",
               options.draft_vocab_size, " needs a ranking file, found none");

  target_.config = read_model_config(options.model);
  if (!target_.config.synthetic_seed) {
    target_checkpoint_ = std::make_unique<Checkpoint>(options.model);
    FRSPEC_CHECK(!target_checkpoint_->contains("fc.weight"), ModelError, options.model,
                 ": expected a whole model, found an EAGLE drafter");
  }
  dtype_ = weight_dtype(options, target_.config, target_checkpoint_.get());
  backend_ = make_backend(options.device, options.threads);
  tree_shape_ = options.tree.value_or(backend_->default_tree());
  FRSPEC_CHECK(tree_shape_.min_probability == 0.0 || backend_->host_sees_results(), RequestError,
               "tree min_probability must be 0 on ", backend_->info().name,
               ", whose trees have one shape, found ", tree_shape_.min_probability);
  if (options.plant) tree_shape_.min_probability = 0.0;  // what is planted needs whole trees
  if (options.drafter) {
    std::vector<int32_t> sub_vocab;
    if (options.draft_vocab_size != 0) {
      sub_vocab =
          read_sub_vocab(*options.ranking, options.draft_vocab_size, target_.config.vocab_size,
                         target_.config.eos_token_ids, options.tokenizer_fingerprint);
      // All tokens need neither a copy of the head nor a map.
      if (options.draft_vocab_size == target_.config.vocab_size) sub_vocab.clear();
    }
    draft_model_ = open_draft_model(*options.drafter, target_.config, sub_vocab, tree_shape_,
                                    options.medusa_tree ? &*options.medusa_tree : nullptr);
  }
  const int64_t trained_context = target_.config.max_position_embeddings;
  max_context_ = options.max_context > 0 ? options.max_context
                                         : std::min<int64_t>(kDefaultContext, trained_context);
  FRSPEC_CHECK(max_context_ >= 2, RequestError, "max_context must be at least 2, found ",
               max_context_);
  FRSPEC_CHECK(max_context_ <= trained_context, RequestError, "max_context ", max_context_,
               " is beyond the model's max_position_embeddings ", trained_context);

  Arena planning;
  layout(planning, max_context_);
  plan_ = planning.plan();
  arena_bytes_ = planning.used_bytes();
}

void Engine::layout(Arena& arena, int64_t max_context) {
  const int64_t nodes = draft_model_ ? draft_model_->tree_nodes() : 1;
  const int64_t depth = draft_model_ ? draft_model_->tree_depth() : 0;
  const int64_t chunk = backend_->prompt_chunk() > 0 ? backend_->prompt_chunk() : kPrefillRows;
  pass_rows_ = std::max(std::min(chunk, max_context), nodes);
  pass_rows_ = (pass_rows_ + kPromptRowMultiple - 1) / kPromptRowMultiple * kPromptRowMultiple;

  const ModelConfig& config = target_.config;
  WorkspaceLimits limits;
  limits.rows = pass_rows_;
  limits.round_rows = nodes;
  limits.choice_rows = nodes;
  limits.beam_rows = 1;
  limits.vocab = config.vocab_size;
  limits.visible = max_context + nodes;
  raise_limits(limits, config);
  if (draft_model_) draft_model_->raise(limits, max_context);
  backend_->layout(arena, limits);

  target_.layout(*backend_, arena, target_checkpoint_.get(), dtype_, max_context + nodes,
                 max_context + depth, pass_rows_);
  if (draft_model_) draft_model_->layout(*backend_, arena, target_, max_context, pass_rows_);

  constexpr const char* kBuffers = "target activations";
  features_ = arena.take_tensor(kBuffers, backend_->activation_dtype(dtype_), pass_rows_,
                                config.hidden_size);
  logits_ = arena.take_tensor("target logits", DType::kF32, nodes, config.vocab_size);
  constexpr const char* kRound = "round buffers";
  const auto rows = static_cast<size_t>(pass_rows_);
  const auto context_tokens = static_cast<size_t>(max_context);
  pass_tokens_ = arena.take_array<int32_t>(kRound, rows);
  pass_next_tokens_ = arena.take_array<int32_t>(kRound, rows);
  pass_positions_ = arena.take_array<int32_t>(kRound, rows);
  pass_prefix_ = arena.take_array<int32_t>(kRound, rows);
  pass_rows_index_ = arena.take_array<int32_t>(kRound, rows);

  const auto node_count = static_cast<size_t>(nodes);
  tree_ = layout_tree(arena, kRound, static_cast<int32_t>(nodes));
  chosen_ = arena.take_array<int32_t>(kRound, node_count);
  walk_result_size_ = 1 + 2 * (depth + 1);
  walk_result_ = arena.take_array<int32_t>(kRound, static_cast<size_t>(walk_result_size_));
  root_ = arena.take_array<int32_t>(kRound, 2);
  if (!arena.planning()) {
    walk_ = {walk_result_, walk_result_ + 1, walk_result_ + 1 + depth + 1, {root_, root_ + 1}};
  }
  sampling_ = arena.take_array<Sampling>(kRound, 1);
  if (options_.plant) {
    planted_tokens_ = arena.take_array<int32_t>(kRound, context_tokens);
    plant_ = arena.take_array<Plant>(kRound, 1);
  }
}

int64_t Engine::longest_context_within(size_t bytes) {
  const auto fits = [&](int64_t context) {
    Arena arena;
    layout(arena, context);
    return arena.plan().total_bytes() <= bytes;
  };
  if (!fits(2)) return 0;
  int64_t low = 2;
  int64_t high = max_context_;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (fits(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

void Engine::load() {
  if (loaded_) return;
  const size_t needed = plan_.total_bytes();
  const size_t device_bytes = backend_->info().available_bytes;
  const bool limited = options_.memory_limit > 0 && options_.memory_limit < device_bytes;
  const size_t available = limited ? options_.memory_limit : device_bytes;
  if (needed > available) {
    const int64_t context = longest_context_within(available);
    const std::string advice = context > 0
                                   ? concat("a max_context of ", context, " would fit")
                                   : std::string("no context fits; the weights alone are larger");
    throw MemoryPlanError(concat("the memory plan needs ", needed, " bytes for max_context ",
                                 max_context_, ", but ", limited ? "memory_limit is " : "only ",
                                 available, limited ? " bytes; " : " bytes are available; ",
                                 advice));
  }
  Arena arena(backend_->allocate(arena_bytes_), arena_bytes_);
  layout(arena, max_context_);

  std::vector<int32_t> index(static_cast<size_t>(pass_rows_));
  std::iota(index.begin(), index.end(), 0);
  backend_->upload(pass_rows_index_, index.data(), index.size() * sizeof(int32_t));
  backend_->end_load();
  target_checkpoint_.reset();
  if (draft_model_) draft_model_->end_load();

  const auto context = static_cast<size_t>(max_context_);
  const auto round_tokens = static_cast<size_t>(walk_result_size_);
  sequence_.reserve(context + round_tokens);
  prompt_.reserve(context);
  new_tokens_.reserve(round_tokens);
  accept_lengths_.reserve(context);
  host_ints_.resize(std::max(static_cast<size_t>(pass_rows_), round_tokens));
  loaded_ = true;
}

int64_t Engine::draft_vocab_size() const { return draft_model_ ? draft_model_->head_width() : 0; }

size_t Engine::step_bytes() const {
  size_t bytes = 0;
  for (const MemoryItem& item : plan_.items) {
    if (item.name == Llama::kWeights) bytes += item.bytes;
  }
  const ModelConfig& config = target_.config;
  if (!config.tie_word_embeddings) {  // one row of the embedding is read, not the table
    bytes -= backend_->linear_bytes(dtype_, config.vocab_size, config.hidden_size);
  }
  return bytes;
}

void Engine::check_request(std::span<const int32_t> prompt, const Request& request) const {
  FRSPEC_CHECK(loaded_, RequestError, "the engine is not loaded");
  FRSPEC_CHECK(!prompt.empty(), RequestError, "the prompt is empty; at least one token is needed");
  const auto length = static_cast<int64_t>(prompt.size());
  FRSPEC_CHECK(length < max_context_, RequestError, "the prompt has ", length,
               " tokens; with max_context ", max_context_, " at most ", max_context_ - 1,
               " are possible");
  for (size_t i = 0; i < prompt.size(); ++i) {
    FRSPEC_CHECK(prompt[i] >= 0 && prompt[i] < target_.config.vocab_size, RequestError, "token id ",
                 prompt[i], " at position ", i, " is outside [0, ", target_.config.vocab_size, ")");
  }
  FRSPEC_CHECK(request.max_new_tokens >= 1, RequestError,
               "max_new_tokens must be at least 1, found ", request.max_new_tokens);
  const Sampling& sampling = request.sampling;
  FRSPEC_CHECK(std::isfinite(sampling.temperature) && sampling.temperature >= 0.0f, RequestError,
               "temperature must be a finite number >= 0, found ", sampling.temperature);
  FRSPEC_CHECK(sampling.top_k >= 0, RequestError, "top_k must be >= 0 (0: all), found ",
               sampling.top_k);
  FRSPEC_CHECK(sampling.top_p > 0.0f && sampling.top_p <= 1.0f, RequestError,
               "top_p must be in (0, 1], found ", sampling.top_p);
  FRSPEC_CHECK(sampling.min_p >= 0.0f && sampling.min_p <= 1.0f, RequestError,
               "min_p must be in [0, 1], found ", sampling.min_p);
  FRSPEC_CHECK(request.method == Method::kPlain || request.method == draft_method(), RequestError,
               "method '", method_name(request.method), "' needs a drafter of its kind, found ",
               draft_model_ ? concat("one for '", method_name(draft_method()), "'") : "none");
}

int32_t Engine::check_accept_length(double accept_length) const {
  FRSPEC_CHECK(draft_model_ != nullptr, RequestError, "planting needs a drafter");
  const int32_t depth = std::min(draft_model_->tree_depth(), draft_model_->tree_nodes() - 1);
  FRSPEC_CHECK(accept_length >= 1.0 && accept_length <= depth + 1.0, RequestError,
               "accept_length must be 1 to ", depth + 1, " for a tree of depth ", depth, ", found ",
               accept_length);
  return depth;
}

void Engine::plant(std::span<const int32_t> recorded, double accept_length) {
  FRSPEC_CHECK(options_.plant && draft_model_ != nullptr && loaded_, RequestError,
               "planting needs a loaded engine with a drafter and EngineOptions::plant");
  FRSPEC_CHECK(static_cast<int64_t>(recorded.size()) <= max_context_, RequestError,
               "the recorded sequence has ", recorded.size(), " tokens, max_context is ",
               max_context_);
  const int32_t depth = check_accept_length(accept_length);
  plants_ = !recorded.empty();
  if (!plants_) return;
  backend_->upload(planted_tokens_, recorded.data(), recorded.size() * sizeof(int32_t));
  Plant plant;
  plant.recorded = planted_tokens_;
  plant.length = static_cast<int32_t>(recorded.size());
  plant.depth = depth;
  plant.vocab = static_cast<int32_t>(target_.config.vocab_size);
  plant.acceptance = acceptance_for(accept_length, depth);
  backend_->upload(plant_, &plant, sizeof plant);
}

void Engine::start(std::span<const int32_t> prompt, const Request& request) {
  check_request(prompt, request);
  const auto length = static_cast<int64_t>(prompt.size());

  const auto known = std::min(sequence_.size(), prompt.size());
  const int64_t common =
      std::mismatch(prompt.begin(), prompt.begin() + static_cast<int64_t>(known), sequence_.begin())
          .first -
      prompt.begin();
  // The last prompt token is always computed: its logits choose the first token.
  int64_t kept = std::min({common, target_.kv.length, length - 1});
  const int64_t chunk = backend_->prompt_chunk();
  if (chunk > 0) kept = std::min(kept, whole_chunks_);
  // Row i of a drafter that remembers holds token i + 1 as well. Features are not kept: where the
  // drafter goes on, the target computes them again.
  const int64_t observed = std::min(observed_, std::max<int64_t>(common - 1, 0));
  const bool drafts = request.method != Method::kPlain;
  if (drafts && draft_model_->remembers()) kept = std::min(kept, observed);
  if (chunk > 0) kept = kept / chunk * chunk;
  observed_ = std::min(observed, kept);
  whole_chunks_ = chunk > 0 ? kept : 0;
  unobserved_ = 0;

  drafter_ = drafts ? static_cast<Drafter*>(draft_model_.get()) : &no_drafter_;
  tree_.nodes = drafter_->tree_nodes();
  request_ = request;
  backend_->upload(sampling_, &request_.sampling, sizeof(Sampling));
  prompt_.assign(prompt.begin(), prompt.end());
  sequence_.assign(prompt.begin(), prompt.begin() + kept);
  target_.kv.length = kept;
  emitted_count_ = 0;
  emit_limit_ = std::min(request.max_new_tokens, max_context_ - length);
  in_prompt_ = true;
  profiles_ = request.profile_drafting && drafts;
  last_rows_ = 0;
  finish_reason_ = FinishReason::kNone;
  new_tokens_.clear();
  accept_lengths_.clear();
  reused_tokens_ = kept;
  timings_ = Timings{};
}

std::span<const int32_t> Engine::step() {
  new_tokens_.clear();
  if (finished()) return new_tokens_;
  if (in_prompt_) {
    prefill_chunk();
  } else {
    round();
  }
  return new_tokens_;
}

void Engine::prefill_chunk() {
  Stopwatch watch;
  const int64_t first = target_.kv.length;
  const auto length = static_cast<int64_t>(prompt_.size());
  const int64_t n = std::min(pass_rows_, length - first);
  const bool last = first + n == length;
  const size_t bytes = static_cast<size_t>(n) * sizeof(int32_t);
  const int64_t bound = backend_->length_bound(first + n);

  backend_->upload(pass_tokens_, prompt_.data() + first, bytes);
  const int32_t root[2] = {0, static_cast<int32_t>(first + n)};
  backend_->upload(root_, root, sizeof(root));
  backend_->number_rows(pass_positions_, pass_prefix_, root_ + 1, n);
  Pass pass;
  pass.kind = Rows::kPrompt;
  pass.rows = n;
  pass.tokens = pass_tokens_;
  pass.positions = pass_positions_;
  pass.slots = pass_positions_;
  pass.visible.prefix_length = pass_prefix_;
  pass.visible.max_length = bound;
  target_.forward(*backend_, pass, features_.row_slice(0, n));

  int32_t chosen = -1;
  if (last) {
    const Tensor logits = logits_.row_slice(0, 1);
    backend_->linear(logits, features_.row_slice(n - 1, 1), target_.head, Rows::kTarget);
    backend_->choose_tokens(root_, logits, sampling_, pass_positions_ + n - 1);
    backend_->download(&chosen, root_, sizeof(chosen));
    float logit = 0;  // NaN only where all of them are
    backend_->download(&logit, logits.row<float>(0) + chosen, sizeof(logit));
    FRSPEC_CHECK(!std::isnan(logit), ModelError, options_.model,
                 ": the model's logits are no numbers: damaged weights, or values beyond the range"
                 " of the dtype");
    last_rows_ = 1;
  }
  if (drafter_->observes()) {
    std::copy_n(prompt_.begin() + first + 1, last ? n - 1 : n, host_ints_.begin());
    if (last) host_ints_[static_cast<size_t>(n - 1)] = chosen;
    backend_->upload(pass_next_tokens_, host_ints_.data(), bytes);
    drafter_->observe(*backend_, features_, pass_rows_index_, pass_next_tokens_, root_ + 1, n,
                      bound, no_marks_);
    observed_ += n;
  }
  if (!last) backend_->synchronize();

  sequence_.insert(sequence_.end(), prompt_.begin() + first, prompt_.begin() + first + n);
  target_.kv.length = first + n;
  if (n == backend_->prompt_chunk()) whole_chunks_ += n;
  if (last) {
    in_prompt_ = false;
    sequence_.push_back(chosen);
    emit(std::span(&chosen, 1));
  }
  timings_.prefill += watch.lap();
}

int32_t Engine::draft_and_verify(int64_t length_bound) {
  Backend& backend = *backend_;
  StageMarks& marks = profiles_ ? draft_marks_ : no_marks_;
  marks.begin(backend);
  DraftTree tree = tree_;
  tree.nodes = drafter_->draft(backend, tree_, walk_.root, length_bound, marks);
  if (plants_ && drafter_->observes()) backend.plant_tree(tree, plant_);
  backend.mark(kDrafted);

  const int64_t nodes = tree.nodes;
  Pass pass;
  pass.rows = nodes;
  pass.tokens = tree.tokens;
  pass.positions = tree.positions;
  pass.slots = tree.slots;
  pass.visible = {tree.prefix, tree.base, tree.ancestors, tree.ancestor_words, length_bound};
  const Tensor features = features_.row_slice(0, nodes);
  const Tensor logits = logits_.row_slice(0, nodes);
  target_.forward(backend, pass, features);
  backend.linear(logits, features, target_.head, Rows::kTarget);
  backend.mark(kVerified);

  backend.choose_tokens(chosen_, logits, sampling_, tree.positions);
  backend.walk_tree(walk_, tree, chosen_);
  backend.commit_kv(target_.kv.layers.data(), target_.config.num_layers, tree.base, walk_.path,
                    walk_.length);
  backend.post(walk_result_, static_cast<size_t>(walk_result_size_) * sizeof(int32_t));
  return tree.nodes;
}

void Engine::round() {
  Stopwatch watch;
  const int64_t base = target_.kv.length;
  const int64_t bound = backend_->length_bound(base + drafter_->tree_depth() + 1);
  backend_->mark(kStarted);
  const bool observes = unobserved_ > 0;  // the nodes that the last round accepted
  if (observes) {
    backend_->run({WorkKey::kObserve, static_cast<int32_t>(unobserved_), bound, profiles_}, [&] {
      StageMarks& marks = profiles_ ? observe_marks_ : no_marks_;
      marks.begin(*backend_);
      drafter_->observe(*backend_, features_, walk_.path, walk_.emitted, walk_.root.base,
                        unobserved_, bound, marks);
    });
    observed_ += unobserved_;
    unobserved_ = 0;
  }
  const auto kind = !drafter_->observes() ? WorkKey::kPlainRound
                    : plants_             ? WorkKey::kPlantedRound
                                          : WorkKey::kDraftedRound;
  last_rows_ = tree_.nodes;  // and less only where nothing is replayed
  backend_->run({kind, tree_.nodes, bound, profiles_},
                [&] { last_rows_ = draft_and_verify(bound); });
  backend_->synchronize();

  const auto* result = static_cast<const int32_t*>(backend_->mailbox());
  const int32_t accepted = result[0];
  const int32_t* emitted = result + (walk_.emitted - walk_result_);
  target_.kv.length += accepted;
  sequence_.insert(sequence_.end(), emitted, emitted + accepted);
  emit(std::span(emitted, static_cast<size_t>(accepted)));
  accept_lengths_.push_back(static_cast<int32_t>(new_tokens_.size()));
  if (drafter_->observes()) unobserved_ = accepted;
  if (finished()) {  // what was accepted behind the end is forgotten, as if it never was
    target_.kv.length = static_cast<int64_t>(prompt_.size()) + emitted_count_ - 1;
    sequence_.resize(static_cast<size_t>(target_.kv.length) + 1);
  }
  const double draft = backend_->seconds_between(kStarted, kDrafted);
  const double verify = backend_->seconds_between(kDrafted, kVerified);
  if (profiles_) {
    if (observes) observe_marks_.add_seconds(timings_.draft_stages);
    draft_marks_.add_seconds(timings_.draft_stages);
  }
  timings_.draft += draft;
  timings_.verify += verify;
  timings_.rest += std::max(0.0, watch.lap() - draft - verify);
}

void Engine::emit(std::span<const int32_t> tokens) {
  const std::vector<int32_t>& ends = target_.config.eos_token_ids;
  for (const int32_t token : tokens) {
    new_tokens_.push_back(token);
    ++emitted_count_;
    if (!request_.ignore_eos && std::find(ends.begin(), ends.end(), token) != ends.end()) {
      finish_reason_ = FinishReason::kStop;
      return;
    }
    if (emitted_count_ == emit_limit_) {
      finish_reason_ = FinishReason::kLength;
      return;
    }
  }
}

Engine::LastRound Engine::last_round() const {
  LastRound last;
  if (last_rows_ == 0) return last;
  const auto rows = static_cast<size_t>(last_rows_);
  last.logits.resize(rows * static_cast<size_t>(logits_.cols));
  backend_->download(last.logits.data(), logits_.data, last.logits.size() * sizeof(float));
  if (!accept_lengths_.empty()) {
    last.tokens.resize(rows);
    last.parents.resize(rows);
    backend_->download(last.tokens.data(), tree_.tokens, rows * sizeof(int32_t));
    backend_->download(last.parents.data(), tree_.parents, rows * sizeof(int32_t));
  }
  return last;
}

}  // namespace frspec
