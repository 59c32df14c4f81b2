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

  // Whether it is to be shown the sequence, by observe().
  virtual bool observes() const = 0;

  // Positions [*end - n, *end) of the sequence, which follow the last observed ones: their features
  // are the rows `rows` [n] of the target's features [., d], the tokens behind them are next_tokens
  // [n]. All in backend memory. length_bound: of *end.
  virtual void observe(Backend& backend, const Tensor& features, const int32_t* rows,
                       const int32_t* next_tokens, const int32_t* end, int64_t n,
                       int64_t length_bound) = 0;

  // Drafts below the root, which follows the last observed position, and builds the tree.
  // length_bound: of the root's position and the levels below it.
  virtual void draft(Backend& backend, const DraftTree& tree, const TreeRoot& root,
                     int64_t length_bound) = 0;
};

class NoDrafter final : public Drafter {
 public:
  int32_t tree_nodes() const override { return 1; }
  int32_t tree_depth() const override { return 0; }
  bool observes() const override { return false; }
  void observe(Backend&, const Tensor&, const int32_t*, const int32_t*, const int32_t*, int64_t,
               int64_t) override {}
  void draft(Backend& backend, const DraftTree& tree, const TreeRoot& root, int64_t) override {
    backend.build_tree(tree, DraftPool{}, root);
  }
};

}  // namespace frspec
