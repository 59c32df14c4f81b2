// The engine owns everything: backend, memory, target, drafter. One step is a chunk of the prompt
// or one round of draft, verify, choose, walk, commit.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend.h"
#include "checkpoint.h"
#include "draft_stages.h"
#include "drafter.h"
#include "llama.h"
#include "medusa_choices.h"

namespace frspec {

struct EngineOptions {
  std::string model;                   // folder
  std::optional<std::string> drafter;  // folder; without one only plain decoding is possible
  std::optional<std::string> ranking;  // file; needed when draft_vocab_size is given
  int64_t draft_vocab_size = 0;        // sub-vocabulary of the drafter's head; 0: full
  std::string tokenizer_fingerprint;   // checked against the ranking's; empty: unchecked
  std::string device = "auto";         // "auto", "cpu", "cuda" or "cuda:N"
  std::optional<std::string> dtype;    // of the weights in memory; default: as stored
  int64_t max_context = 0;             // prompt and generated tokens; 0: the model's, at most 4096
  size_t memory_limit = 0;             // bytes; 0: what the device has
  int threads = 0;                     // 0: all that the process may use
  std::optional<TreeShape> tree;       // absent: what suits the device
  std::optional<MedusaTreeOptions> medusa_tree;  // needs a Medusa drafter; absent: its default
  bool plant = false;                            // room for plant()
};

struct Request {
  Method method = Method::kPlain;
  Sampling sampling;
  int64_t max_new_tokens = 256;
  bool ignore_eos = false;
  // Fills Timings::draft_stages. On a GPU the stamps take time of their own, and the kernels of a
  // stage wait for those of the stage before it.
  bool profile_drafting = false;
};

enum class FinishReason { kNone, kStop, kLength };

// Seconds since start(), by what they were spent on.
struct Timings {
  double prefill = 0.0;         // prompt passes of target and drafter
  double draft = 0.0;           // drafter's passes between prompt and end
  double verify = 0.0;          // target's passes over trees
  double rest = 0.0;            // choosing, walking, committing
  StageSeconds draft_stages{};  // of `draft`; zeros unless the request asks for it
};

class Engine {
 public:
  // Reads configs and file headers and plans the memory; no weight is read. Throws ModelError,
  // RankingError, RequestError (nonsense options), DeviceError, or MemoryPlanError (a plan beyond
  // all memory, a GPU without room for so much as a context).
  explicit Engine(const EngineOptions& options);

  // Takes the planned memory and loads the weights. MemoryPlanError when it does not fit.
  void load();

  const MemoryPlan& plan() const { return plan_; }
  const ModelConfig& config() const { return target_.config; }
  DeviceInfo device() const { return backend_->info(); }
  DType dtype() const { return dtype_; }
  int64_t max_context() const { return max_context_; }
  // Of the drafts; what a drafter would be given, without one.
  TreeShape tree() const { return draft_model_ ? draft_model_->tree_shape() : tree_shape_; }
  // kPlain without a drafter.
  Method draft_method() const { return draft_model_ ? draft_model_->method() : Method::kPlain; }
  int64_t draft_vocab_size() const;  // columns of the draft head; 0 without a drafter
  size_t step_bytes() const;         // weight bytes that a plain decoding step reads
  double measure_bandwidth() { return backend_->measure_bandwidth(); }  // once loaded

  // For benchmarks: from here on, drafted rounds have the tokens of `recorded` (prompt and
  // continuation, as plain decoding wrote it) planted into their trees, so that they accept
  // accept_length tokens on average (plant.h). Empty: ends that.
  void plant(std::span<const int32_t> recorded, double accept_length);
  // RequestError unless the trees are deep enough for that, loaded or not; their depth.
  int32_t check_accept_length(double accept_length) const;

  // Begins a sequence. The longest usable prefix of the previous one is kept in the KV cache; the
  // rest of the prompt is computed by the following steps. RequestError leaves the previous state
  // as it was.
  void start(std::span<const int32_t> prompt, const Request& request);

  // One step. Returns the new tokens (none for a prompt chunk that is not the last); valid until
  // the next call. Does nothing when finished.
  std::span<const int32_t> step();
  bool finished() const { return finish_reason_ != FinishReason::kNone; }
  FinishReason finish_reason() const { return finish_reason_; }

  const Timings& timings() const { return timings_; }
  int64_t reused_tokens() const { return reused_tokens_; }  // of the prompt, by the latest start()
  // Tokens that each round emitted, the first token (from the prompt) not counted.
  const std::vector<int32_t>& accept_lengths() const { return accept_lengths_; }

  // The tree that the latest round verified, and the target's logits of its nodes [nodes, V],
  // copied to the host. Before the first round: no nodes; after the prompt: one row, that chose the
  // first token.
  struct LastRound {
    std::vector<int32_t> tokens;
    std::vector<int32_t> parents;
    std::vector<float> logits;
  };
  LastRound last_round() const;

 private:
  // Of a round, for Backend::mark. observe() has at most two stages; draft()'s have the rest.
  enum Stamp { kStarted, kDrafted, kVerified, kObserveBegun, kDraftBegun = kObserveBegun + 3 };

  void layout(Arena& arena, int64_t max_context);
  int64_t longest_context_within(size_t bytes);
  void check_request(std::span<const int32_t> prompt, const Request& request) const;
  void prefill_chunk();
  int32_t draft_and_verify(int64_t length_bound);  // nodes of the tree
  void round();
  void emit(std::span<const int32_t> tokens);

  EngineOptions options_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Checkpoint> target_checkpoint_;
  DType dtype_ = DType::kBF16;
  TreeShape tree_shape_;
  int64_t max_context_ = 0;
  MemoryPlan plan_;
  size_t arena_bytes_ = 0;  // of the plan, what load() takes itself
  bool loaded_ = false;

  Llama target_;
  NoDrafter no_drafter_;
  std::unique_ptr<DraftModel> draft_model_;
  Drafter* drafter_ = &no_drafter_;  // of the current request

  // Backend memory.
  int64_t pass_rows_ = 0;
  Tensor features_;                 // [pass rows, d]
  Tensor logits_;                   // [tree nodes, V]
  int32_t* pass_tokens_ = nullptr;  // [pass rows], and likewise below
  int32_t* pass_next_tokens_ = nullptr;
  int32_t* pass_positions_ = nullptr;  // slots are the same numbers
  int32_t* pass_prefix_ = nullptr;
  int32_t* pass_rows_index_ = nullptr;  // 0, 1, 2, ...
  DraftTree tree_;
  int32_t* chosen_ = nullptr;       // [tree nodes]
  int32_t* walk_result_ = nullptr;  // [1 + 2 (depth + 1)]: length, path, emitted
  TreeWalk walk_;
  int64_t walk_result_size_ = 0;
  int32_t* root_ = nullptr;       // [2]: token, base
  Sampling* sampling_ = nullptr;  // [1] of the current request
  int32_t* planted_tokens_ = nullptr;
  Plant* plant_ = nullptr;  // [1]
  bool plants_ = false;

  // The current sequence: sequence_[i] is in KV slot i for i < target_.kv.length; the element
  // behind those is the root, chosen but not yet computed.
  Request request_;
  std::vector<int32_t> sequence_;
  std::vector<int32_t> prompt_;
  int64_t emitted_count_ = 0;
  int64_t emit_limit_ = 0;
  bool in_prompt_ = false;
  bool profiles_ = false;  // the stages of drafting
  StageMarks no_marks_;
  StageMarks observe_marks_{kObserveBegun};
  StageMarks draft_marks_{kDraftBegun};
  int64_t observed_ = 0;      // leading positions that the drafter has observed
  int64_t unobserved_ = 0;    // nodes of the last round that it has not
  int64_t whole_chunks_ = 0;  // leading positions computed in whole prompt chunks (prompt_chunk())
  int64_t last_rows_ = 0;     // rows of logits_ that the latest step filled
  FinishReason finish_reason_ = FinishReason::kLength;
  std::vector<int32_t> new_tokens_;
  std::vector<int32_t> accept_lengths_;
  std::vector<int32_t> host_ints_;
  int64_t reused_tokens_ = 0;
  Timings timings_;
};

}  // namespace frspec
