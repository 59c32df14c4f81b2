// Attention of a tile of rows over one key/value head:
//   out[D] = sum_t p[t] values[t] / sum_t p[t],  p[t] = exp(q . keys[t] / sqrt(D) - max)
// in blocks of kKvBlock logical positions, merged in ascending order into splits, and the splits in
// ascending order into the result. Within a block a score is summed over D ascending, and an output
// over positions ascending, each in one accumulator; so a result depends on the row's query and the
// keys and values at its logical positions, and neither on their slots nor on which rows share the
// tile.
//
// The cache is in fp32 and keeps the keys of kKvBlock slots transposed (PlainKv in kv_layout.h), so
// that both products have their outputs in the lanes. What all rows of the tile see in the same
// slots is multiplied for all of them at once; each row's own positions follow.
#pragma once

#include "cpu/attention_tile.h"
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
  constexpr int64_t kRows = Simd::kTileRows;
#define FRSPEC_TILE(m) product_tile<m <= Simd::kTileRows ? m : 1>
  static constexpr Tile kTiles[] = {
      nullptr,         FRSPEC_TILE(1),  FRSPEC_TILE(2), FRSPEC_TILE(3), FRSPEC_TILE(4),
      FRSPEC_TILE(5),  FRSPEC_TILE(6),  FRSPEC_TILE(7), FRSPEC_TILE(8), FRSPEC_TILE(9),
      FRSPEC_TILE(10), FRSPEC_TILE(11), FRSPEC_TILE(12)};
#undef FRSPEC_TILE
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

class FP32AttentionTile : public AttentionTile<FP32AttentionTile> {
 public:
  using AttentionTile::AttentionTile;

 private:
  friend class AttentionTile<FP32AttentionTile>;

  void take_queries() {
    const Simd::F scale = Simd::set(task_.scale);
    const int64_t width = task_.heads * task_.head_dim;
    for (int64_t r = 0; r < task_.rows; ++r) {
      for (int64_t i = 0; i < width; i += Simd::kLanes) {
        const Simd::F q = Simd::load_partial(task_.q + r * task_.q_stride + i, width - i);
        Simd::store_partial(s_.q + r * width + i, Simd::mul(q, scale), width - i);
      }
    }
  }

  void run_block(int64_t base, bool) {
    score_block(base);
    // The values that all rows see are multiplied for all at once, and then each row's own.
    const int64_t head_dim = task_.head_dim;
    const int64_t shared = clamp(least_prefix_ - base);
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int64_t count = clamp(visible_[r] - base);
      for (int64_t query = r * task_.heads; query < (r + 1) * task_.heads; ++query) {
        softmax(query, count);
      }
    }
    product(s_.scores, kKvBlock, queries_, values() + base * head_dim, head_dim, shared, head_dim,
            s_.block, head_dim);
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int64_t count = clamp(visible_[r] - base);
      if (count > shared) weigh_own(r, base, shared, count);
    }
    merge({s_.split_max, s_.split_sum, s_.split}, {s_.block_max, s_.block_sum, s_.block}, queries_,
          head_dim);
  }

  void score_slots(int64_t base, int64_t first, int64_t end) {
    first = first / kScoreWidth * kScoreWidth;
    const int64_t columns = (end - first + kScoreWidth - 1) / kScoreWidth * kScoreWidth;
    product(s_.q, task_.head_dim, queries_,
            static_cast<const float*>(task_.keys) + base * task_.head_dim + first, kKvBlock,
            task_.head_dim, columns, s_.scores + first, kKvBlock);
  }

  float* score_at(int64_t query, int64_t column) { return s_.scores + query * kKvBlock + column; }

  // Scores to weights exp(score - max), with their sum: lanes by position.
  void softmax(int64_t query, int64_t count) {
    float* score = s_.scores + query * kKvBlock;
    const float max = count > 0 ? maximum(score, count) : 0.0f;
    const Simd::F maxima = Simd::set(max);
    Simd::F sum = Simd::zero();
    int64_t i = 0;
    for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
      const Simd::F weight = exponential(Simd::sub(Simd::load(score + i), maxima));
      Simd::store(score + i, weight);
      sum = Simd::add(sum, weight);
    }
    if (i < count) {
      const Simd::F weight =
          exponential(Simd::sub(Simd::load_partial(score + i, count - i), maxima));
      Simd::store_partial(score + i, weight, count - i);
      sum = Simd::add(sum, Simd::load_partial(score + i, count - i));
    }
    s_.block_max[query] = max;
    s_.block_sum[query] = Simd::sum(sum);
  }

  // Adds the weighted values of positions first ... end - 1 of the block to row r's sums.
  void weigh_own(int64_t r, int64_t base, int64_t first, int64_t end) {
    const int64_t head_dim = task_.head_dim;
    const float* rows[kKvBlock];
    for (int64_t j = first; j < end; ++j) rows[j] = values() + slot_at(r, base + j) * head_dim;
    for (int64_t query = r * task_.heads; query < (r + 1) * task_.heads; ++query) {
      const float* weights = s_.scores + query * kKvBlock;
      for (int64_t d = 0; d < head_dim; d += Simd::kLanes) {
        const int64_t lanes = head_dim - d;
        float* sums = s_.block + query * head_dim + d;
        Simd::F sum = Simd::load_partial(sums, lanes);
        for (int64_t j = first; j < end; ++j) {
          sum = Simd::fma(Simd::set(weights[j]), Simd::load_partial(rows[j] + d, lanes), sum);
        }
        Simd::store_partial(sums, sum, lanes);
      }
    }
  }

  void end_split() {}

  const float* values() const { return static_cast<const float*>(task_.values); }

  static constexpr int64_t kScoreWidth = 2 * Simd::kLanes;
};

inline void attention(const AttentionTask& task) { FP32AttentionTile(task).run(); }

}  // namespace frspec::cpu::FRSPEC_ISA
