// Attention of a tile of rows over one key/value head:
//   out[D] = sum_t p[t] values[t] / sum_t p[t],  p[t] = exp(q . keys[t] / sqrt(D) - max)
// in blocks of kAttentionBlock logical positions, merged in ascending order into splits, and the
// splits in ascending order into the result. Within a block a score is summed over D ascending, and
// an output over positions ascending, each in one accumulator; so a result depends on the row's
// query and the keys and values at its logical positions, and neither on their slots nor on which
// rows share the tile.
//
// The keys of a block are transposed first: then both products are the tile of multiply_tile.h with
// outputs in the lanes.
#pragma once

#include "cpu/math_kernel.h"
#include "cpu/multiply_tile.h"

namespace frspec::cpu::FRSPEC_ISA {

// out[r] = sum over k ascending of x[r, k] w[k, :], two vectors wide, for M rows; the last
// `columns` < 2 vectors of w may end where memory does.
template <int M>
void product_tile(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth,
                  int64_t columns, float* out, int64_t out_stride) {
  using F = Simd::F;
  F sum[M][2];
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) sum[r][0] = sum[r][1] = Simd::zero();
  const auto run = [&](const auto& load) __attribute__((always_inline)) {
    for (int64_t k = 0; k < depth; ++k) {
      F a, b;
      load(w + k * w_stride, a, b);
#pragma GCC unroll 16
      for (int r = 0; r < M; ++r) {
        const F value = Simd::set(x[r * x_stride + k]);
        sum[r][0] = Simd::fma(value, a, sum[r][0]);
        sum[r][1] = Simd::fma(value, b, sum[r][1]);
      }
    }
  };
  if (columns >= 2 * Simd::kLanes) {
    run([](const float* p, F& a, F& b) __attribute__((always_inline)) {
      a = Simd::load(p);
      b = Simd::load(p + Simd::kLanes);
    });
  } else {
    run([columns](const float* p, F& a, F& b) __attribute__((always_inline)) {
      a = Simd::load_partial(p, columns);
      b = columns > Simd::kLanes ? Simd::load_partial(p + Simd::kLanes, columns - Simd::kLanes)
                                 : Simd::zero();
    });
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) {
    if (columns >= 2 * Simd::kLanes) {
      Simd::store(out + r * out_stride, sum[r][0]);
      Simd::store(out + r * out_stride + Simd::kLanes, sum[r][1]);
    } else {
      Simd::store_partial(out + r * out_stride, sum[r][0], columns);
      if (columns > Simd::kLanes) {
        Simd::store_partial(out + r * out_stride + Simd::kLanes, sum[r][1], columns - Simd::kLanes);
      }
    }
  }
}

// out [rows, columns] = x [rows, depth] . w [depth, columns].
inline void product(const float* x, int64_t x_stride, int64_t rows, const float* w,
                    int64_t w_stride, int64_t depth, int64_t columns, float* out,
                    int64_t out_stride) {
  using Tile =
      void (*)(const float*, int64_t, const float*, int64_t, int64_t, int64_t, float*, int64_t);
  static constexpr Tile kTiles[] = {nullptr,         product_tile<1>, product_tile<2>,
                                    product_tile<3>, product_tile<4>, product_tile<5>,
                                    product_tile<6>};
  constexpr int64_t kRows = Simd::kTileRows < 6 ? Simd::kTileRows : 6;
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t j = 0; j < columns; j += 2 * Simd::kLanes) {
    int64_t row = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = rows / tiles + (t < rows % tiles ? 1 : 0);
      kTiles[m](x + row * x_stride, x_stride, w + j, w_stride, depth, columns - j,
                out + row * out_stride + j, out_stride);
      row += m;
    }
  }
}

// Softmax state of one query: `values` are weighted with exp(score - max), `sum` is the weights'.
struct Partial {
  float* max;
  float* sum;  // 0: nothing yet
  float* values;
};

inline void merge(const Partial& into, const float max, const float sum, const float* values,
                  int64_t head_dim) {
  if (sum == 0.0f) return;
  if (*into.sum == 0.0f) {
    *into.max = max;
    *into.sum = sum;
    for (int64_t d = 0; d < head_dim; ++d) into.values[d] = values[d];
    return;
  }
  const float new_max = max > *into.max ? max : *into.max;
  float factors[2];
  const float maxima[2] = {*into.max, max};
  exponentials(factors, maxima, 2, new_max, 1.0f);
  *into.max = new_max;
  *into.sum = *into.sum * factors[0] + sum * factors[1];
  const Simd::F old_factor = Simd::set(factors[0]);
  const Simd::F factor = Simd::set(factors[1]);
  for (int64_t d = 0; d < head_dim; d += Simd::kLanes) {
    const int64_t count = head_dim - d;
    const Simd::F old = Simd::mul(Simd::load_partial(into.values + d, count), old_factor);
    const Simd::F value = Simd::fma(Simd::load_partial(values + d, count), factor, old);
    Simd::store_partial(into.values + d, value, count);
  }
}

inline void write_out(float* out, const float* values, float sum, int64_t head_dim) {
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int64_t d = 0; d < head_dim; ++d) out[d] = values[d] * inverse;
}

struct BlockRange {
  int64_t base;   // first logical position
  int64_t count;  // positions
};

class AttentionTile {
 public:
  explicit AttentionTile(const AttentionTask& task) : task_(task), s_(*task.scratch) {}

  void run() {
    const int64_t queries = task_.rows * task_.heads;
    const Simd::F scale = Simd::set(task_.scale);
    least_prefix_ = task_.prefix_length[0];
    for (int64_t r = 0; r < task_.rows; ++r) {
      if (task_.prefix_length[r] < least_prefix_) least_prefix_ = task_.prefix_length[r];
      for (int64_t i = 0; i < task_.heads * task_.head_dim; i += Simd::kLanes) {
        const int64_t count = task_.heads * task_.head_dim - i;
        const Simd::F q = Simd::load_partial(task_.q + r * task_.q_stride + i, count);
        Simd::store_partial(s_.q + r * task_.heads * task_.head_dim + i, Simd::mul(q, scale),
                            count);
      }
    }
    longest_ = 0;
    for (int64_t r = 0; r < task_.rows; ++r) {
      int64_t length = task_.prefix_length[r];
      for (int64_t word = 0; word < task_.ancestor_words; ++word) {
        length += __builtin_popcountll(task_.ancestors[r * task_.ancestor_words + word]);
      }
      visible_[r] = length;
      if (length > longest_) longest_ = length;
    }
    for (int64_t i = 0; i < queries; ++i) s_.total_sum[i] = 0.0f;
    for (int64_t split = task_.first_split; split < task_.end_split; ++split) {
      if (split * kAttentionSplit >= longest_ && task_.partial == nullptr) break;
      run_split(split);
    }
    if (task_.partial != nullptr) return;
    for (int64_t r = 0; r < task_.rows; ++r) {
      for (int64_t h = 0; h < task_.heads; ++h) {
        const int64_t i = r * task_.heads + h;
        write_out(task_.out + r * task_.out_stride + h * task_.head_dim,
                  s_.total + i * task_.head_dim, s_.total_sum[i], task_.head_dim);
      }
    }
  }

 private:
  void run_split(int64_t split) {
    const int64_t queries = task_.rows * task_.heads;
    for (int64_t i = 0; i < queries; ++i) s_.split_sum[i] = 0.0f;
    const int64_t end = (split + 1) * kAttentionSplit;
    for (int64_t base = split * kAttentionSplit; base < end && base < longest_;
         base += kAttentionBlock) {
      if (base + kAttentionBlock <= least_prefix_) {
        whole_block(base);
      } else if (task_.ancestor_words == 0) {
        prefix_block(base);
      } else {
        tree_block(base);
      }
    }
    for (int64_t r = 0; r < task_.rows; ++r) {
      for (int64_t h = 0; h < task_.heads; ++h) {
        const int64_t i = r * task_.heads + h;
        const float* values = s_.split + i * task_.head_dim;
        if (task_.partial == nullptr) {
          merge({s_.total_max + i, s_.total_sum + i, s_.total + i * task_.head_dim},
                s_.split_max[i], s_.split_sum[i], values, task_.head_dim);
          continue;
        }
        float* to = task_.partial + r * task_.partial_row_stride + h * task_.partial_head_stride;
        for (int64_t d = 0; d < task_.head_dim; ++d) to[d] = values[d];
        to[task_.head_dim] = s_.split_max[i];
        to[task_.head_dim + 1] = s_.split_sum[i];
      }
    }
  }

  // Every row sees all positions of the block, and they are in slots of the same numbers.
  void whole_block(int64_t base) {
    load_keys(base, kAttentionBlock);
    const int64_t queries = task_.rows * task_.heads;
    scores(0, queries, kAttentionBlock);
    for (int64_t i = 0; i < queries; ++i) softmax(i, kAttentionBlock);
    weigh(0, queries, task_.values + base * task_.head_dim, kAttentionBlock);
  }

  // Rows end at different positions of the block, all of them in slots of the same numbers.
  void prefix_block(int64_t base) {
    const int64_t most = clamp(longest_ - base);
    load_keys(base, most);
    scores(0, task_.rows * task_.heads, most);
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int64_t count = clamp(visible_[r] - base);
      if (count == 0) continue;
      for (int64_t h = 0; h < task_.heads; ++h) softmax(r * task_.heads + h, count);
      weigh(r * task_.heads, task_.heads, task_.values + base * task_.head_dim, count);
    }
  }

  // What all rows share is prepared once, then each row's own positions behind it.
  void tree_block(int64_t base) {
    const int64_t head_dim = task_.head_dim;
    const int64_t shared = clamp(least_prefix_ - base);
    load_keys(base, shared);
    copy(s_.values, task_.values + base * head_dim, shared * head_dim);
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int64_t count = clamp(visible_[r] - base);
      if (count == 0) continue;
      for (int64_t j = shared; j < count && base + j < task_.prefix_length[r]; ++j) {
        place(j, base + j);
      }
      int64_t position = task_.prefix_length[r];  // logical position of the next ancestor
      for (int64_t word = 0; word < task_.ancestor_words; ++word) {
        uint64_t bits = task_.ancestors[r * task_.ancestor_words + word];
        for (; bits != 0; bits &= bits - 1, ++position) {
          const int64_t j = position - base;
          if (j < 0 || j >= count) continue;
          place(j, task_.tree_base + word * 64 + __builtin_ctzll(bits));
        }
      }
      const int64_t first = r * task_.heads;
      scores(first, task_.heads, count);
      for (int64_t h = 0; h < task_.heads; ++h) softmax(first + h, count);
      weigh(first, task_.heads, s_.values, count);
    }
  }

  static int64_t clamp(int64_t count) {
    if (count < 0) return 0;
    return count < kAttentionBlock ? count : kAttentionBlock;
  }

  static void copy(float* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }

  // Transposes the keys of slots base ... base + count - 1 to columns 0 ... count - 1.
  void load_keys(int64_t base, int64_t count) {
    for (int64_t j = 0; j < count; j += 8) {
      const float* rows[8];
      for (int64_t i = 0; i < 8; ++i) {  // behind the end: the last row again
        const int64_t slot = base + (j + i < count ? j + i : count - 1);
        rows[i] = task_.keys + slot * task_.head_dim;
      }
      for (int64_t d = 0; d < task_.head_dim; d += 8) {
        Simd::transpose8(rows, d, s_.keys + d * kAttentionBlock + j, kAttentionBlock);
      }
    }
  }

  // Makes slot the j-th position of the block.
  void place(int64_t j, int64_t slot) {
    const float* key = task_.keys + slot * task_.head_dim;
    for (int64_t d = 0; d < task_.head_dim; ++d) s_.keys[d * kAttentionBlock + j] = key[d];
    copy(s_.values + j * task_.head_dim, task_.values + slot * task_.head_dim, task_.head_dim);
  }

  void scores(int64_t first, int64_t queries, int64_t count) {
    const int64_t width = 2 * Simd::kLanes;
    product(s_.q + first * task_.head_dim, task_.head_dim, queries, s_.keys, kAttentionBlock,
            task_.head_dim, (count + width - 1) / width * width,
            s_.scores + first * kAttentionBlock, kAttentionBlock);
  }

  // Scores to weights exp(score - max), with their sum: lanes by position.
  void softmax(int64_t query, int64_t count) {
    float* score = s_.scores + query * kAttentionBlock;
    const float max = maximum(score, count);
    exponentials(score, score, count, max, 1.0f);
    Simd::F sum = Simd::zero();
    for (int64_t i = 0; i < count; i += Simd::kLanes) {
      sum = Simd::add(sum, Simd::load_partial(score + i, count - i));
    }
    s_.block_max[query] = max;
    s_.block_sum[query] = Simd::sum(sum);
  }

  // The weighted values of the block, merged into the split.
  void weigh(int64_t first, int64_t queries, const float* values, int64_t count) {
    const int64_t head_dim = task_.head_dim;
    product(s_.scores + first * kAttentionBlock, kAttentionBlock, queries, values, head_dim, count,
            head_dim, s_.block + first * head_dim, head_dim);
    for (int64_t i = first; i < first + queries; ++i) {
      merge({s_.split_max + i, s_.split_sum + i, s_.split + i * head_dim}, s_.block_max[i],
            s_.block_sum[i], s_.block + i * head_dim, head_dim);
    }
  }

  const AttentionTask& task_;
  AttentionScratch& s_;
  int64_t visible_[kAttentionQueries];
  int64_t least_prefix_;
  int64_t longest_;
};

inline void attention(const AttentionTask& task) { AttentionTile(task).run(); }

inline void merge_splits(float* out, const float* partial, int64_t splits, int64_t stride,
                         int64_t head_dim, float* scratch) {
  float max = 0.0f;
  float sum = 0.0f;
  for (int64_t i = 0; i < splits; ++i) {
    const float* from = partial + i * stride;
    merge({&max, &sum, scratch}, from[head_dim], from[head_dim + 1], from, head_dim);
  }
  write_out(out, scratch, sum, head_dim);
}

}  // namespace frspec::cpu::FRSPEC_ISA
