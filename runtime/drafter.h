// What the engine asks of a drafter. Plain decoding is a drafter too: one that drafts nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "checkpoint.h"
#include "config.h"
#include "draft_stages.h"
#include "draft_tree.h"
#include "medusa_choices.h"

namespace frspec {

class Llama;

enum class Method { kPlain, kEagle2, kMedusa };

// As users write them: "plain", "eagle2", "medusa".
const char* method_name(Method method);
// RequestError otherwise.
Method parse_method(const std::string& name);

class Drafter {
 public:
  virtual ~Drafter() = default;

  // Nodes of the tree that draft() builds, root included: at most, with TreeShape::min_probability,
  // else in every round.
  virtual int32_t tree_nodes() const = 0;
  // Levels below the root.
  virtual int32_t tree_depth() const = 0;

  // Whether it is to be shown the sequence, by observe().
  virtual bool observes() const = 0;

  // Positions [*end - n, *end) of the sequence, which follow the last observed ones: their features
  // are the rows `rows` [n] of the target's features [., d], the tokens behind them are next_tokens
  // [n]. All in backend memory. length_bound: of *end. marks: begun; takes the stages.
  virtual void observe(Backend& backend, const Tensor& features, const int32_t* rows,
                       const int32_t* next_tokens, const int32_t* end, int64_t n,
                       int64_t length_bound, StageMarks& marks) = 0;

  // Drafts below the root, which follows the last observed position, and builds the tree.
  // length_bound: of the root's position and the levels below it. marks: likewise. Returns how many
  // nodes the tree has.
  virtual int32_t draft(Backend& backend, const DraftTree& tree, const TreeRoot& root,
                        int64_t length_bound, StageMarks& marks) = 0;
};

class NoDrafter final : public Drafter {
 public:
  int32_t tree_nodes() const override { return 1; }
  int32_t tree_depth() const override { return 0; }
  bool observes() const override { return false; }
  void observe(Backend&, const Tensor&, const int32_t*, const int32_t*, const int32_t*, int64_t,
               int64_t, StageMarks&) override {}
  int32_t draft(Backend& backend, const DraftTree& tree, const TreeRoot& root, int64_t,
                StageMarks&) override {
    backend.build_tree(tree, DraftPool{}, root);
    return tree.nodes;
  }
};

// A drafter with weights of its own.
class DraftModel : public Drafter {
 public:
  virtual Method method() const = 0;
  bool observes() const override { return true; }
  // Whether draft() needs what observe() was shown of every position before the root, or of the
  // last one alone.
  virtual bool remembers() const = 0;
  // Of the drafts, as far as this drafter can fill the shape that was asked for.
  virtual TreeShape tree_shape() const = 0;
  // Columns of the draft head: the sub-vocabulary, or the vocabulary.
  virtual int64_t head_width() const = 0;

  // Raises the limits to what its ops ask for, for sequences of max_context tokens.
  virtual void raise(WorkspaceLimits& limits, int64_t max_context) const = 0;
  // Takes memory and loads weights, in the target's dtype. slots: committed positions of a
  // sequence. observed_rows: most rows of one observe().
  virtual void layout(Backend& backend, Arena& arena, const Llama& target, int64_t slots,
                      int64_t observed_rows) = 0;
  // No layout() will follow.
  void end_load() { checkpoint_.reset(); }

 protected:
  std::unique_ptr<Checkpoint> checkpoint_;  // none for random weights (synthetic.h)
};

// ModelError unless the sizes of the drafter in `folder`, where it names them (not 0), are the
// target's.
void check_draft_sizes(const std::string& folder, int64_t hidden_size, int64_t vocab_size,
                       const ModelConfig& target);

// The drafter in `folder`, of the kind that its config.json tells. sub_vocab: token ids of the
// draft head's columns; empty: the full vocabulary. No weight is read. ModelError when it does not
// fit the target, RequestError for a tree that cannot be drafted.
std::unique_ptr<DraftModel> open_draft_model(const std::string& folder, const ModelConfig& target,
                                             const std::vector<int32_t>& sub_vocab,
                                             const TreeShape& shape,
                                             const MedusaTreeOptions* medusa_tree);

}  // namespace frspec
