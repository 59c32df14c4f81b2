// What the engine asks of a drafter. Plain decoding is a drafter too: one that drafts nothing.
#pragma once

#include <cstdint>

#include "backend.h"
#include "draft_tree.h"

namespace frspec {

class Drafter {
 public:
  virtual ~Drafter() = default;

  // Nodes of the tree that draft() builds, root included; the same every round.
  virtual int32_t tree_nodes() const = 0;
  // Levels below the root.
  virtual int32_t tree_depth() const = 0;

  // Positions of the sequence that the drafter has observed and would keep; -1: it needs none.
  virtual int64_t length() const = 0;
  // Forgets everything observed from position `length` on.
  virtual void truncate(int64_t length) = 0;

  // The next n positions of the sequence: their features are the rows `rows` [n] of the target's
  // features [., d], the tokens that follow them are next_tokens [n]. All in backend memory.
  virtual void observe(Backend& backend, const Tensor& features, const int32_t* rows,
                       const int32_t* next_tokens, int64_t n) = 0;

  // Drafts below the root, which follows the last observed position, and builds the tree.
  virtual void draft(Backend& backend, const DraftTree& tree, const TreeRoot& root) = 0;
};

class NoDrafter final : public Drafter {
 public:
  int32_t tree_nodes() const override { return 1; }
  int32_t tree_depth() const override { return 0; }
  int64_t length() const override { return -1; }
  void truncate(int64_t) override {}
  void observe(Backend&, const Tensor&, const int32_t*, const int32_t*, int64_t) override {}
  void draft(Backend& backend, const DraftTree& tree, const TreeRoot& root) override {
    backend.build_tree(tree, DraftPool{}, root);
  }
};

}  // namespace frspec
