// The Medusa drafter (arXiv 2401.10774, section 2.1) over checkpoints of FasterDecoding/Medusa,
// with FR-Spec sub-vocabulary heads (arXiv 2502.14856, table 5).
//
// Head h (from 0) reads the target's feature (the hidden state after its final norm) at the
// position whose logits chose the root, and predicts the token h + 1 positions behind the root:
// residual blocks x + silu(W x + b), then an LM head of its own. The best tokens of each head fill
// a tree whose shape was chosen before (medusa_choices.h), or the part of it that is likely. The
// drafter keeps nothing of the sequence but that one feature.
#pragma once

#include <string>
#include <vector>

#include "drafter.h"
#include "medusa_choices.h"

namespace frspec {

class Medusa final : public DraftModel {
 public:
  // ModelError for a checkpoint whose heads do not fit its config or the target, RequestError for a
  // tree that they cannot fill. Heads that the tree does not use are not loaded.
  Medusa(const std::string& folder, const MedusaConfig& config, const ModelConfig& target,
         std::vector<int32_t> sub_vocab, const TreeShape& shape,
         const MedusaTreeOptions& tree_options);

  Method method() const override { return Method::kMedusa; }
  bool remembers() const override { return false; }
  TreeShape tree_shape() const override {
    return {plan_.depth, plan_.width, tree_nodes(), min_probability_};
  }
  int64_t head_width() const override;
  int32_t tree_nodes() const override { return static_cast<int32_t>(plan_.parents.size()); }
  int32_t tree_depth() const override { return plan_.depth; }
  void raise(WorkspaceLimits& limits, int64_t max_context) const override;
  void layout(Backend& backend, Arena& arena, const Llama& target, int64_t slots,
              int64_t observed_rows) override;

  void observe(Backend& backend, const Tensor& features, const int32_t* rows,
               const int32_t* next_tokens, const int32_t* end, int64_t n, int64_t length_bound,
               StageMarks& marks) override;
  int32_t draft(Backend& backend, const DraftTree& tree, const TreeRoot& root, int64_t length_bound,
                StageMarks& marks) override;

 private:
  struct Head {
    std::vector<LinearWeight> blocks;  // [d, d] each
    LinearWeight lm_head;              // [S, d]
  };

  // The candidates of the heads first ... first + count - 1.
  void score(Backend& backend, int64_t first, int64_t count, StageMarks& marks);
  // Those of one head after another while a further level pays. Returns of how many.
  int64_t score_while_likely(Backend& backend, StageMarks& marks);
  // Numbers the nodes of the plan whose paths are likely enough, in likely_*; `scored`: the heads
  // that have candidates. Returns how many there are.
  int32_t keep_likely_nodes(int64_t scored);

  MedusaConfig config_;
  int64_t vocab_size_;
  std::vector<int32_t> sub_vocab_;
  MedusaTree plan_;
  double min_probability_;  // 0 for a whole tree of the user's
  ScoreLimits limits_;
  std::string prefix_;  // of the checkpoint's tensor names

  std::vector<Head> heads_;           // [depth of the tree]
  int32_t* column_tokens_ = nullptr;  // [S] token of each column; null: the identity
  StaticTree shape_;
  Tensor feature_;                       // [1, d] before the root
  Tensor hidden_;                        // [heads, d]
  Tensor product_;                       // [heads, d]
  Tensor logits_;                        // [heads, S]
  int32_t* feature_rows_ = nullptr;      // [heads] 0
  float* logprobs_ = nullptr;            // [heads, width]
  int32_t* candidate_tokens_ = nullptr;  // [heads, width]

  // With a min_probability, where the host sees them; [nodes of the plan] each.
  float* scores_ = nullptr;     // log-probability of the path
  int32_t* numbers_ = nullptr;  // of a kept node among those, -1: not kept
  int32_t* likely_parents_ = nullptr;
  int32_t* likely_candidates_ = nullptr;
};

}  // namespace frspec
