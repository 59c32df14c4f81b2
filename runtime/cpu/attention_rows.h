// What the rows of an attention tile see: shared by the tiles of attention_kernel.h and
// bf16_attention_kernel.h, which score keys in their own way.
#pragma once

#include "cpu/kernels.h"

namespace frspec::cpu::FRSPEC_ISA {

// Tile has score_slots(base, first, end): scores of all queries with the slots base + first ...
// base + end - 1 of the cache's block at slot `base`, and maybe some around them; and
// score_at(query, column): where the score with slot base + column is.
template <typename Tile>
class AttentionRows {
 protected:
  AttentionRows(const AttentionTask& task, int32_t* ancestor_slots, float* ancestor_scores)
      : task_(task), ancestor_slots_(ancestor_slots), ancestor_scores_(ancestor_scores) {
    queries_ = task_.rows * task_.heads;
    least_prefix_ = most_prefix_ = task_.prefix_length[0];
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int64_t prefix = task_.prefix_length[r];
      if (prefix < least_prefix_) least_prefix_ = prefix;
      if (prefix > most_prefix_) most_prefix_ = prefix;
      visible_[r] = prefix + list_ancestors(r);
      if (visible_[r] > longest_) longest_ = visible_[r];
    }
  }

  // Scores of every row's ancestors: all slots of the tile's ancestors are scored for all queries,
  // block by block of the cache, and each row takes its own. Slots that follow the prefix in its
  // last block wait for score_block(), which scores that block anyway.
  void score_ancestors() {
    int64_t first_slot = INT64_MAX;
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int64_t count = ancestor_count(r);
      if (count == 0) continue;
      const int32_t* slots = ancestor_slots_ + r * kMaxAncestors;
      if (slots[0] < first_slot) first_slot = slots[0];
      if (slots[count - 1] >= end_slot_) end_slot_ = slots[count - 1] + 1;
    }
    if (first_slot >= end_slot_) return;
    int64_t base = first_slot / kKvBlock * kKvBlock;
    if (base <= least_prefix_ && base / kAttentionSplit >= task_.first_split &&
        base / kAttentionSplit < task_.end_split) {
      waiting_base_ = base;
      base += kKvBlock;
    }
    for (; base < end_slot_; base += kKvBlock) {
      const int64_t first = first_slot > base ? first_slot - base : 0;
      tile().score_slots(base, first, clamp(end_slot_ - base));
      take_ancestors(base);
    }
  }

  // Scores of all rows with the logical positions base ... base + kKvBlock - 1 that they see.
  void score_block(int64_t base) {
    const bool waiting = base == waiting_base_;
    const int64_t end =
        clamp((waiting && end_slot_ > most_prefix_ ? end_slot_ : most_prefix_) - base);
    if (end > 0) tile().score_slots(base, 0, end);
    if (waiting) take_ancestors(base);
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int64_t prefix = task_.prefix_length[r];
      const int64_t count = clamp(visible_[r] - base);
      for (int64_t query = r * task_.heads; query < (r + 1) * task_.heads; ++query) {
        const float* ancestors = ancestor_scores_ + query * kMaxAncestors;
        for (int64_t j = clamp(prefix - base); j < count; ++j) {
          *tile().score_at(query, j) = ancestors[base + j - prefix];
        }
      }
    }
  }

  int64_t ancestor_count(int64_t r) const { return visible_[r] - task_.prefix_length[r]; }

  // The values at a logical position of row r.
  const float* values_at(int64_t r, int64_t position) const {
    const int64_t prefix = task_.prefix_length[r];
    const int64_t slot =
        position < prefix ? position : ancestor_slots_[r * kMaxAncestors + position - prefix];
    return task_.values + slot * task_.head_dim;
  }

  static int64_t clamp(int64_t count) {
    if (count < 0) return 0;
    return count < kKvBlock ? count : kKvBlock;
  }

  const AttentionTask& task_;
  int64_t queries_;
  int64_t visible_[kAttentionQueries];  // logical positions of each row
  int64_t least_prefix_;
  int64_t most_prefix_;
  int64_t longest_ = 0;

 private:
  Tile& tile() { return static_cast<Tile&>(*this); }

  // The slots of row r's ancestors, root first; returns how many there are.
  int64_t list_ancestors(int64_t r) {
    int32_t* slots = ancestor_slots_ + r * kMaxAncestors;
    int64_t count = 0;
    for (int64_t word = 0; word < task_.ancestor_words; ++word) {
      uint64_t bits = task_.ancestors[r * task_.ancestor_words + word];
      for (; bits != 0; bits &= bits - 1) {
        slots[count++] = static_cast<int32_t>(task_.tree_base + word * 64 + __builtin_ctzll(bits));
      }
    }
    return count;
  }

  // From the scores of the cache's block at slot `base`.
  void take_ancestors(int64_t base) {
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int32_t* slots = ancestor_slots_ + r * kMaxAncestors;
      for (int64_t i = 0; i < ancestor_count(r); ++i) {
        if (slots[i] < base || slots[i] >= base + kKvBlock) continue;
        for (int64_t query = r * task_.heads; query < (r + 1) * task_.heads; ++query) {
          ancestor_scores_[query * kMaxAncestors + i] = *tile().score_at(query, slots[i] - base);
        }
      }
    }
  }

  int32_t* ancestor_slots_;    // [rows, kMaxAncestors]
  float* ancestor_scores_;     // [queries, kMaxAncestors]
  int64_t end_slot_ = 0;       // behind all ancestors
  int64_t waiting_base_ = -1;  // of the block whose ancestors' scores score_block() takes, if any
};

}  // namespace frspec::cpu::FRSPEC_ISA
