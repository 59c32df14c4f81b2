// What the tiles of attention_kernel.h and bf16_attention_kernel.h share: which slots each row
// sees, where ancestors' scores come from, and how blocks make splits and splits the result.
#pragma once

#include "cpu/math_kernel.h"

namespace frspec::cpu::FRSPEC_ISA {

// Softmax states of queries: `values` [queries, D] are weighted with exp(score - max), `sum` is the
// weights', 0 where there is nothing yet.
struct Partials {
  float* max;
  float* sum;
  float* values;
};

inline void merge(const Partials& into, const Partials& from, int64_t queries, int64_t head_dim) {
  float maxima[kAttentionQueries];
  float old_factors[kAttentionQueries] = {};
  float factors[kAttentionQueries] = {};
  for (int64_t i = 0; i < queries; ++i) {
    maxima[i] = from.max[i] > into.max[i] ? from.max[i] : into.max[i];
    old_factors[i] = into.max[i] - maxima[i];
    factors[i] = from.max[i] - maxima[i];
  }
  exponentials(old_factors, old_factors, queries, 0.0f, 1.0f);
  exponentials(factors, factors, queries, 0.0f, 1.0f);
  for (int64_t i = 0; i < queries; ++i) {
    if (from.sum[i] == 0.0f) continue;
    float* to = into.values + i * head_dim;
    const float* values = from.values + i * head_dim;
    if (into.sum[i] == 0.0f) {
      into.max[i] = from.max[i];
      into.sum[i] = from.sum[i];
      for (int64_t d = 0; d < head_dim; ++d) to[d] = values[d];
      continue;
    }
    into.max[i] = maxima[i];
    into.sum[i] = into.sum[i] * old_factors[i] + from.sum[i] * factors[i];
    const Simd::F old_factor = Simd::set(old_factors[i]);
    const Simd::F factor = Simd::set(factors[i]);
    for (int64_t d = 0; d < head_dim; d += Simd::kLanes) {
      const int64_t count = head_dim - d;
      const Simd::F old = Simd::mul(Simd::load_partial(to + d, count), old_factor);
      const Simd::F value = Simd::fma(Simd::load_partial(values + d, count), factor, old);
      Simd::store_partial(to + d, value, count);
    }
  }
}

inline void write_out(float* out, const float* values, float sum, int64_t head_dim) {
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int64_t d = 0; d < head_dim; ++d) out[d] = values[d] * inverse;
}

inline void write_rows(const AttentionTask& task, const float* values, const float* sums) {
  for (int64_t r = 0; r < task.rows; ++r) {
    for (int64_t h = 0; h < task.heads; ++h) {
      const int64_t i = r * task.heads + h;
      write_out(task.out + r * task.out_stride + h * task.head_dim, values + i * task.head_dim,
                sums[i], task.head_dim);
    }
  }
}

// One split's states to where merge_splits() finds them.
inline void write_partials(const AttentionTask& task, const Partials& partials) {
  for (int64_t r = 0; r < task.rows; ++r) {
    for (int64_t h = 0; h < task.heads; ++h) {
      const int64_t i = r * task.heads + h;
      float* to = task.partial + r * task.partial_row_stride + h * task.partial_head_stride;
      for (int64_t d = 0; d < task.head_dim; ++d) to[d] = partials.values[i * task.head_dim + d];
      to[task.head_dim] = partials.max[i];
      to[task.head_dim + 1] = partials.sum[i];
    }
  }
}

inline void merge_splits(float* out, float* partial, int64_t splits, int64_t stride,
                         int64_t head_dim, float* scratch) {
  float max = 0.0f;
  float sum = 0.0f;
  for (int64_t i = 0; i < splits; ++i) {
    float* from = partial + i * stride;
    merge({&max, &sum, scratch}, {from + head_dim, from + head_dim + 1, from}, 1, head_dim);
  }
  write_out(out, scratch, sum, head_dim);
}

// Kind, which derives from this, has
// - take_queries(): the queries to s_.q, scaled;
// - score_slots(base, first, end): scores of all queries with the slots base + first ... base + end
//   - 1 of the cache's block at slot `base`, and maybe some around them;
// - score_at(query, column): where the score with slot base + column is;
// - run_block(base, first): adds the block of logical positions from `base` on, the first of the
//   split or not, to the split's states;
// - end_split(): leaves them in s_.split, s_.split_max and s_.split_sum.
template <typename Kind>
class AttentionTile {
 public:
  explicit AttentionTile(const AttentionTask& task) : task_(task), s_(*task.scratch) {
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

  void run() {
    kind().take_queries();
    score_ancestors();
    clear(s_.total_max, s_.total_sum);
    for (int64_t split = task_.first_split; split < task_.end_split; ++split) {
      if (split * kAttentionSplit >= longest_ && task_.partial == nullptr) break;
      run_split(split);
    }
    if (task_.partial == nullptr) write_rows(task_, s_.total, s_.total_sum);
  }

 protected:
  // Scores of all rows with the logical positions base ... base + kKvBlock - 1 that they see.
  void score_block(int64_t base) {
    const bool waiting = base == waiting_base_;
    const int64_t end =
        clamp((waiting && end_slot_ > most_prefix_ ? end_slot_ : most_prefix_) - base);
    if (end > 0) kind().score_slots(base, 0, end);
    if (waiting) take_ancestors(base);
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int64_t prefix = task_.prefix_length[r];
      const int64_t count = clamp(visible_[r] - base);
      for (int64_t query = r * task_.heads; query < (r + 1) * task_.heads; ++query) {
        const float* ancestors = s_.ancestor_scores + query * kMaxAncestors;
        for (int64_t j = clamp(prefix - base); j < count; ++j) {
          *kind().score_at(query, j) = ancestors[base + j - prefix];
        }
      }
    }
  }

  int64_t ancestor_count(int64_t r) const { return visible_[r] - task_.prefix_length[r]; }

  // The slot of a logical position of row r.
  int64_t slot_at(int64_t r, int64_t position) const {
    const int64_t prefix = task_.prefix_length[r];
    return position < prefix ? position : s_.ancestor_slots[r * kMaxAncestors + position - prefix];
  }

  static int64_t clamp(int64_t count) {
    if (count < 0) return 0;
    return count < kKvBlock ? count : kKvBlock;
  }

  const AttentionTask& task_;
  AttentionScratch& s_;
  int64_t queries_;
  int64_t visible_[kAttentionQueries];  // logical positions of each row
  int64_t least_prefix_;
  int64_t most_prefix_;
  int64_t longest_ = 0;

 private:
  Kind& kind() { return static_cast<Kind&>(*this); }

  void clear(float* max, float* sum) {
    for (int64_t i = 0; i < queries_; ++i) {
      max[i] = -__builtin_inff();
      sum[i] = 0.0f;
    }
  }

  void run_split(int64_t split) {
    clear(s_.split_max, s_.split_sum);
    const int64_t first = split * kAttentionSplit;
    const int64_t end = first + kAttentionSplit;
    for (int64_t base = first; base < end && base < longest_; base += kKvBlock) {
      kind().run_block(base, base == first);
    }
    kind().end_split();
    const Partials partials{s_.split_max, s_.split_sum, s_.split};
    if (task_.partial == nullptr) {
      merge({s_.total_max, s_.total_sum, s_.total}, partials, queries_, task_.head_dim);
    } else {
      write_partials(task_, partials);
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
      const int32_t* slots = s_.ancestor_slots + r * kMaxAncestors;
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
      kind().score_slots(base, first, clamp(end_slot_ - base));
      take_ancestors(base);
    }
  }

  // The slots of row r's ancestors, root first; returns how many there are.
  int64_t list_ancestors(int64_t r) {
    int32_t* slots = s_.ancestor_slots + r * kMaxAncestors;
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
      const int32_t* slots = s_.ancestor_slots + r * kMaxAncestors;
      for (int64_t i = 0; i < ancestor_count(r); ++i) {
        if (slots[i] < base || slots[i] >= base + kKvBlock) continue;
        for (int64_t query = r * task_.heads; query < (r + 1) * task_.heads; ++query) {
          s_.ancestor_scores[query * kMaxAncestors + i] = *kind().score_at(query, slots[i] - base);
        }
      }
    }
  }

  int64_t end_slot_ = 0;       // behind all ancestors
  int64_t waiting_base_ = -1;  // of the block whose ancestors' scores score_block() takes, if any
};

}  // namespace frspec::cpu::FRSPEC_ISA
