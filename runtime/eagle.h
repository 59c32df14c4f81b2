// The EAGLE-2 drafter (arXiv 2406.16858) over checkpoints of SafeAILab/EAGLE's v1/v2 layout, with
// an FR-Spec sub-vocabulary head (arXiv 2502.14856, section 3).
//
// Row i of the drafter reads the embedding of token i + 1 and the target's feature i (the hidden
// state after its final norm) and predicts feature i + 1, on which the target's head is used as it
// is. While a tree grows, the drafter's own prediction stands in for the feature.
#pragma once

#include <vector>

#include "drafter.h"
#include "llama.h"

namespace frspec {

class Eagle final : public DraftModel {
 public:
  // sub_vocab: token ids of the draft head's columns; empty: the full vocabulary. Both are scored
  // with the target's own head. ModelError for a folder that does not fit the target.
  Eagle(const std::string& folder, const ModelConfig& target, std::vector<int32_t> sub_vocab,
        const TreeShape& shape);

  Method method() const override { return Method::kEagle2; }
  bool remembers() const override { return true; }
  TreeShape tree_shape() const override {
    return {shape_.depth, topk_, tree_nodes(), shape_.min_probability};
  }
  int64_t head_width() const override;
  void raise(WorkspaceLimits& limits, int64_t max_context) const override;
  // The KV cache holds the beam besides the slots.
  void layout(Backend& backend, Arena& arena, const Llama& target, int64_t slots,
              int64_t observed_rows) override;

  int32_t tree_nodes() const override;
  int32_t tree_depth() const override { return shape_.depth; }
  void observe(Backend& backend, const Tensor& features, const int32_t* rows,
               const int32_t* next_tokens, const int32_t* end, int64_t n, int64_t length_bound,
               StageMarks& marks) override;
  int32_t draft(Backend& backend, const DraftTree& tree, const TreeRoot& root, int64_t length_bound,
                StageMarks& marks) override;

 private:
  // concat_ rows [0, n) -> hidden rows [0, n).
  void forward(Backend& backend, const Pass& pass, StageMarks& marks) const;
  // Scores the hidden rows and expands them to the next level of the pool.
  void expand(Backend& backend, int level, const Tensor& hidden, StageMarks& marks);
  // Whether a candidate's path is likely enough to be kept.
  bool is_likely(int32_t candidate) const { return pool_.scores[candidate] >= limits_.node; }
  // Nodes of the beam to draft from, which come first in it; 0 where no further level pays.
  int likely_beam() const;
  // Nodes of a tree of at most `nodes`, root included.
  int32_t likely_nodes(int32_t nodes) const;

  ModelConfig config_;
  TreeShape shape_;
  std::vector<int32_t> sub_vocab_;
  int topk_;         // shape.topk, or the head's width when that is smaller
  LinearWeight fc_;  // [d, 2 d]
  std::vector<DecoderLayer> layers_;
  LinearWeight embedding_;            // the drafter's own, or the target's
  LinearWeight head_;                 // [S, d]
  int32_t* column_tokens_ = nullptr;  // [S] token of each column; null: the identity

  KvCache kv_;
  Tensor rope_;
  LayerWorkspace workspace_;
  Tensor concat_;                        // [rows, 2 d] embedding, feature
  Tensor last_hidden_;                   // [1, d] predicted after the last observed position
  Tensor logits_;                        // [topk, S]
  float* logprobs_ = nullptr;            // [topk, topk]
  int32_t* candidate_tokens_ = nullptr;  // [topk, topk]
  DraftPool pool_;
  DraftLevel level_;
  int32_t candidates_ = 0;  // in the pool, of this round
  ScoreLimits limits_;
  int32_t* observed_positions_ = nullptr;  // [observed rows]; slots are the same numbers
  int32_t* observed_prefix_ = nullptr;     // [observed rows]
  int32_t* row_index_ = nullptr;           // [observed rows] 0, 1, 2, ...
};

}  // namespace frspec
