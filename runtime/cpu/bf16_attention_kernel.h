// Attention for models in bf16, with vdpbf16ps: queries, keys, values and softmax weights are
// rounded to bf16, products are summed in fp32, at twice the rate of attention_kernel.h.
//
// The keys and values of a block of the cache are packed as the weights of a linear are, and both
// products are multiply(). Within a split the softmax is the running one of FlashAttention (arXiv
// 2205.14135): what is summed so far is scaled down when a block brings a larger score. Positions
// are multiplied in pairs of logical positions, so a result depends on the row's query and the keys
// and values at its logical positions alone, as in attention_kernel.h.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/bf16_pairs_kernel.h"
#include "cpu/linear_kernel.h"

namespace frspec::cpu::FRSPEC_ISA {

// The two halves of each 32 bits: low and high, rounded.
FRSPEC_INLINE Simd::F bf16_pairs(Simd::F low, Simd::F high) {
  static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                               21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                               11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
  __m512i halves;
  __builtin_memcpy(&halves, &rounded, sizeof(halves));
  const __m512i pairs = _mm512_permutexvar_epi16(_mm512_loadu_si512(kInterleave), halves);
  return _mm512_castsi512_ps(pairs);
}

// 2^x within 5e-5 of itself for x in [-126, 0], which is finer than the bf16 it is rounded to; 0
// below; NaN stays NaN. x = n + r with |r| <= 1 / 2, and 2^r by its Taylor polynomial of degree 4.
FRSPEC_INLINE Simd::F power_of_two_within_bf16(Simd::F x) {
  using F = Simd::F;
  const F clamped = Simd::max(Simd::set(-127.0f), x);
  const F n = Simd::round(clamped);
  const F r = Simd::sub(clamped, n);
  F y = Simd::set(9.6181291e-3f);  // ln(2)^4 / 4!, and so on
  y = Simd::fma(y, r, Simd::set(5.5504109e-2f));
  y = Simd::fma(y, r, Simd::set(2.4022651e-1f));
  y = Simd::fma(y, r, Simd::set(6.9314718e-1f));
  y = Simd::fma(y, r, Simd::set(1.0f));
  return Simd::mul(y, Simd::power_of_two(n));  // whose exponent for -127 is that of 0
}

class BF16AttentionTile : public AttentionTile<BF16AttentionTile> {
 public:
  using AttentionTile::AttentionTile;

 private:
  friend class AttentionTile<BF16AttentionTile>;
  using Weights = BF16PairWeights;

  static constexpr int64_t kOutputs = 2 * Simd::kLanes;  // of a panel
  static constexpr int64_t kWeightStride = kKvBlock / 2;
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2 = 0.69314718f;

  // Whether packing a block fetches the next one, which the products leave time for. A full tile is
  // one of many over the same keys, which are in a cache already.
  bool fetches_ahead(int64_t base) const {
    return base + kKvBlock < longest_ && queries_ + task_.heads <= kAttentionQueries;
  }

  int64_t query_stride() const { return (task_.head_dim + 15) / 16 * 8; }
  int64_t head_panels() const { return (task_.head_dim + kOutputs - 1) / kOutputs; }

  void take_queries() {
    const Simd::F scale = Simd::set(task_.scale * kLog2E);  // scores are logarithms to base 2
    for (int64_t r = 0; r < task_.rows; ++r) {
      for (int64_t h = 0; h < task_.heads; ++h) {
        const float* q = task_.q + r * task_.q_stride + h * task_.head_dim;
        float scaled[kMaxHeadDim];
        for (int64_t d = 0; d < task_.head_dim; d += Simd::kLanes) {
          Simd::store(scaled + d, Simd::mul(Simd::load_partial(q + d, task_.head_dim - d), scale));
        }
        float* rounded = s_.q + (r * task_.heads + h) * query_stride();
        round_rows(reinterpret_cast<uint16_t*>(rounded), 0, scaled, 0, 1, task_.head_dim);
      }
    }
  }

  void run_block(int64_t base, bool first) {
    score_block(base);
    softmax(base);
    if (first) {
      for (int64_t i = 0; i < head_panels() * queries_ * kOutputs; ++i) s_.block[i] = 0.0f;
    } else {
      scale_down();
    }
    // The pairs that all rows see are multiplied for all at once, and then each row's own.
    const int64_t shared = clamp(least_prefix_ - base) / 2 * 2;
    if (shared > 0) {
      pack_values(base, shared);
      multiply<Weights>({s_.packed, shared / 2 * Weights::kGroupBytes, head_panels(), s_.weights,
                         kWeightStride, queries_, shared, s_.block, true});
    }
    for (int64_t r = 0; r < task_.rows; ++r) {
      const int64_t count = clamp(visible_[r] - base);
      if (count > shared) weigh_own(r, base, shared, count);
    }
  }

  void end_split() {
    for (int64_t i = 0; i < queries_; ++i) {
      if (s_.split_sum[i] == 0.0f) continue;
      s_.split_max[i] *= kLn2;  // merge() knows natural logarithms
      for (int64_t d = 0; d < task_.head_dim; d += Simd::kLanes) {
        Simd::store_partial(s_.split + i * task_.head_dim + d, Simd::load(sum_at(i, d)),
                            task_.head_dim - d);
      }
    }
  }

  // Panels of 32 slots, by pairs of D. Columns around first ... end - 1 hold whatever the cache
  // does.
  void score_slots(int64_t base, int64_t first, int64_t end) {
    first = first / kOutputs * kOutputs;
    const float* keys = task_.keys + base * task_.head_dim;
    const int64_t panel = task_.head_dim / 2 * kOutputs;
    const int64_t block = task_.head_dim * kKvBlock;
    const bool ahead = fetches_ahead(base);
    for (int64_t d = 0; d < task_.head_dim; d += 2) {  // as they lie in memory
      float* to = s_.packed + d / 2 * kOutputs;
      for (int64_t column = first; column < end; column += kOutputs, to += panel) {
        const float* low = keys + d * kKvBlock + column;
        const float* high = low + kKvBlock;
        for (int64_t j = 0; j < kOutputs; j += Simd::kLanes) {
          if (ahead) {
            Simd::prefetch(low + j + block);
            Simd::prefetch(high + j + block);
          }
          Simd::store(to + j, bf16_pairs(Simd::load(low + j), Simd::load(high + j)));
        }
      }
    }
    multiply<Weights>({s_.packed, task_.head_dim / 2 * Weights::kGroupBytes,
                       (end - first + kOutputs - 1) / kOutputs, s_.q, query_stride(), queries_,
                       task_.head_dim, s_.scores + first * queries_});
  }

  float* score_at(int64_t query, int64_t column) {
    return s_.scores + (column / kOutputs * queries_ + query) * kOutputs + column % kOutputs;
  }

  float* sum_at(int64_t query, int64_t d) {
    return s_.block + (d / kOutputs * queries_ + query) * kOutputs + d % kOutputs;
  }

  // Scores to rounded weights 2^(score - max) [queries, kKvBlock], 0 where the row does not see the
  // position; max and sum go on, and `factors` says what is left of the sums so far.
  void softmax(int64_t base) {
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t count = clamp(visible_[i / task_.heads] - base);
      Simd::F maxima = Simd::set(s_.split_max[i]);
      for (int64_t j = 0; j < count; j += Simd::kLanes) {
        float* score = score_at(i, j);
        for (int64_t k = count - j; k < Simd::kLanes; ++k) score[k] = -__builtin_inff();
        maxima = Simd::max(Simd::load(score), maxima);
      }
      const float max = Simd::maximum(maxima);
      s_.factors[i] = count > 0 ? s_.split_max[i] - max : 0.0f;
      s_.split_max[i] = max;
    }
    exponentials(s_.factors, s_.factors, queries_, 0.0f, kLn2);
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t count = clamp(visible_[i / task_.heads] - base);
      const Simd::F max = Simd::set(s_.split_max[i]);
      uint16_t* weights = reinterpret_cast<uint16_t*>(s_.weights + i * kWeightStride);
      Simd::F sum = Simd::zero();
      int64_t j = 0;
      for (; j < count; j += Simd::kLanes) {
        const Simd::F weight = power_of_two_within_bf16(Simd::sub(Simd::load(score_at(i, j)), max));
        sum = Simd::add(sum, weight);
        const __m256bh rounded = _mm512_cvtneps_pbh(weight);
        __builtin_memcpy(weights + j, &rounded, sizeof(rounded));
      }
      for (; j < kKvBlock; j += Simd::kLanes) {
        __builtin_memset(weights + j, 0, Simd::kLanes * sizeof(uint16_t));
      }
      s_.split_sum[i] = s_.split_sum[i] * s_.factors[i] + Simd::sum(sum);
    }
  }

  void scale_down() {
    for (int64_t p = 0; p < head_panels(); ++p) {
      for (int64_t i = 0; i < queries_; ++i) {
        float* sums = s_.block + (p * queries_ + i) * kOutputs;
        const Simd::F factor = Simd::set(s_.factors[i]);
        Simd::store(sums, Simd::mul(Simd::load(sums), factor));
        Simd::store(sums + Simd::kLanes, Simd::mul(Simd::load(sums + Simd::kLanes), factor));
      }
    }
  }

  // Panels of 32 elements of D, by pairs of positions; count is even.
  void pack_values(int64_t base, int64_t count) {
    const float* values = task_.values + base * task_.head_dim;
    const int64_t panel = count / 2 * kOutputs;
    const int64_t block = task_.head_dim * kKvBlock;
    const bool ahead = fetches_ahead(base);
    for (int64_t j = 0; j < count; j += 2) {
      float* to = s_.packed + j / 2 * kOutputs;
      const float* low = values + j * task_.head_dim;
      for (int64_t d = 0; d < task_.head_dim; d += kOutputs, to += panel) {
        for (int64_t i = 0; i < kOutputs; i += Simd::kLanes) {
          if (ahead) {
            Simd::prefetch(low + d + i + block);
            Simd::prefetch(low + d + i + block + task_.head_dim);
          }
          Simd::store(to + i, value_pairs(low, low + task_.head_dim, d + i));
        }
      }
    }
  }

  Simd::F value_pairs(const float* low, const float* high, int64_t d) const {
    const int64_t lanes = task_.head_dim - d > 0 ? task_.head_dim - d : 0;
    const Simd::F second = high != nullptr ? Simd::load_partial(high + d, lanes) : Simd::zero();
    return bf16_pairs(Simd::load_partial(low + d, lanes), second);
  }

  // Adds the weighted values of positions first ... end - 1 of the block to row r's sums; first is
  // even.
  void weigh_own(int64_t r, int64_t base, int64_t first, int64_t end) {
    for (int64_t d = 0; d < task_.head_dim; d += Simd::kLanes) {
      for (int64_t j = first; j < end; j += 2) {
        const float* high = j + 1 < end ? values_at(r, base + j + 1) : nullptr;
        Simd::store(s_.packed + j / 2 * Simd::kLanes, value_pairs(values_at(r, base + j), high, d));
      }
      for (int64_t query = r * task_.heads; query < (r + 1) * task_.heads; ++query) {
        const float* weights = s_.weights + query * kWeightStride;
        Simd::F sum = Simd::load(sum_at(query, d));
        for (int64_t pair = first / 2; pair < (end + 1) / 2; ++pair) {
          sum = Weights::multiply_add(Simd::set(weights[pair]),
                                      Simd::load(s_.packed + pair * Simd::kLanes), sum);
        }
        Simd::store(sum_at(query, d), sum);
      }
    }
  }
};

inline void bf16_attention(const AttentionTask& task) { BF16AttentionTile(task).run(); }

}  // namespace frspec::cpu::FRSPEC_ISA
