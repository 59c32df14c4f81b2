// Attention of a tile of a prompt's rows over one key/value head, with vdpbf16ps: queries, keys,
// values and softmax weights are rounded to bf16, products are summed in fp32. That is twice the
// rate of attention_kernel.h, and less exact: for rows of a prompt alone, which are cut into the
// same tiles in every mode, so that their bits may depend on the tile.
//
// Block by block of the cache the keys and values are packed as the weights of a linear are, and
// both products are multiply(). The softmax is the running one of FlashAttention (arXiv
// 2205.14135): what is summed so far is scaled down when a block brings a larger score.
#pragma once

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
// below. x = n + r with |r| <= 1 / 2, and 2^r by its Taylor polynomial of degree 4.
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

class PromptTile {
 public:
  explicit PromptTile(const AttentionTask& task) : task_(task), s_(task.scratch->prompt) {}

  void run() {
    queries_ = task_.rows * task_.heads;
    round_queries();
    int64_t longest = 0;
    for (int64_t r = 0; r < task_.rows; ++r) {
      if (task_.prefix_length[r] > longest) longest = task_.prefix_length[r];
    }
    for (int64_t i = 0; i < queries_; ++i) {
      s_.max[i] = -__builtin_inff();
      s_.sum[i] = 0.0f;
    }
    for (int64_t base = 0; base < longest; base += kKvBlock) {
      const int64_t left = longest - base;
      run_block(base, left < kKvBlock ? left : kKvBlock);
    }
    write_out();
  }

 private:
  static constexpr int64_t kOutputs = 2 * Simd::kLanes;  // of a panel
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2 = 0.69314718f;

  // 32-bit units between the queries, or the weights of two queries.
  int64_t query_stride() const { return (task_.head_dim + 15) / 16 * 8; }
  static constexpr int64_t kWeightStride = kKvBlock / 2;

  int64_t head_panels() const { return (task_.head_dim + kOutputs - 1) / kOutputs; }

  void round_queries() {
    // Scores are logarithms to base 2.
    const Simd::F scale = Simd::set(task_.scale * kLog2E);
    for (int64_t r = 0; r < task_.rows; ++r) {
      for (int64_t h = 0; h < task_.heads; ++h) {
        const float* q = task_.q + r * task_.q_stride + h * task_.head_dim;
        float scaled[kMaxHeadDim];
        for (int64_t d = 0; d < task_.head_dim; d += Simd::kLanes) {
          Simd::store(scaled + d, Simd::mul(Simd::load_partial(q + d, task_.head_dim - d), scale));
        }
        prepare_row(s_.q + (r * task_.heads + h) * query_stride(), scaled, task_.head_dim);
      }
    }
  }

  void run_block(int64_t base, int64_t count) {
    pack_keys(base, count);
    multiply<BF16PairWeights>({s_.packed, task_.head_dim / 2 * BF16PairWeights::kGroupBytes,
                               (count + kOutputs - 1) / kOutputs, s_.q, query_stride(), queries_,
                               task_.head_dim, s_.scores, false});
    softmax(base, count);
    if (base > 0) scale_down();
    pack_values(base, count);
    multiply<BF16PairWeights>({s_.packed, (count + 1) / 2 * BF16PairWeights::kGroupBytes,
                               head_panels(), s_.weights, kWeightStride, queries_, count, s_.total,
                               base > 0});
  }

  // Panels of 32 positions, by pairs of D. Columns behind the last position hold whatever the cache
  // does; softmax() drops their scores.
  void pack_keys(int64_t base, int64_t count) {
    const float* keys = task_.keys + base * task_.head_dim;
    float* to = s_.packed;
    for (int64_t column = 0; column < count; column += kOutputs) {
      for (int64_t d = 0; d < task_.head_dim; d += 2) {
        const float* low = keys + d * kKvBlock + column;
        const float* high = low + kKvBlock;
        for (int64_t j = 0; j < kOutputs; j += Simd::kLanes) {
          Simd::store(to + j, bf16_pairs(Simd::load(low + j), Simd::load(high + j)));
        }
        to += kOutputs;
      }
    }
  }

  // Panels of 32 elements of D, by pairs of positions.
  void pack_values(int64_t base, int64_t count) {
    const float* values = task_.values + base * task_.head_dim;
    float* to = s_.packed;
    for (int64_t d = 0; d < task_.head_dim; d += kOutputs) {
      for (int64_t j = 0; j < count; j += 2) {
        for (int64_t i = d; i < d + kOutputs; i += Simd::kLanes) {
          const int64_t lanes = task_.head_dim - i > 0 ? task_.head_dim - i : 0;
          const float* low = values + j * task_.head_dim + i;
          const Simd::F second =
              j + 1 < count ? Simd::load_partial(low + task_.head_dim, lanes) : Simd::zero();
          Simd::store(to, bf16_pairs(Simd::load_partial(low, lanes), second));
          to += Simd::kLanes;
        }
      }
    }
  }

  // Scores [panels, queries, 32] to rounded weights 2^(score - max) [queries, pairs of positions],
  // 0 where the query does not see the position; max and sum go on, and `factors` says what is
  // left of the sums so far.
  void softmax(int64_t base, int64_t count) {
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t visible = visible_in_block(i, base, count);
      Simd::F maxima = Simd::set(s_.max[i]);
      for (int64_t j = 0; j < visible; j += Simd::kLanes) {
        float* score = score_at(i, j);
        for (int64_t k = visible - j; k < Simd::kLanes; ++k) score[k] = -__builtin_inff();
        maxima = Simd::max(Simd::load(score), maxima);
      }
      const float max = Simd::maximum(maxima);
      s_.factors[i] = visible > 0 ? s_.max[i] - max : 0.0f;
      s_.max[i] = max;
    }
    exponentials(s_.factors, s_.factors, queries_, 0.0f, kLn2);
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t visible = visible_in_block(i, base, count);
      const Simd::F max = Simd::set(s_.max[i]);
      uint16_t* weights = reinterpret_cast<uint16_t*>(s_.weights + i * kWeightStride);
      Simd::F sum = Simd::zero();
      int64_t j = 0;
      for (; j < visible; j += Simd::kLanes) {
        const Simd::F weight = power_of_two_within_bf16(Simd::sub(Simd::load(score_at(i, j)), max));
        sum = Simd::add(sum, weight);
        const __m256bh rounded = _mm512_cvtneps_pbh(weight);
        __builtin_memcpy(weights + j, &rounded, sizeof(rounded));
      }
      for (; j < count; ++j) weights[j] = 0;
      if (count % 2 != 0 && j == count) weights[count] = 0;
      s_.sum[i] = s_.sum[i] * s_.factors[i] + Simd::sum(sum);
    }
  }

  int64_t visible_in_block(int64_t query, int64_t base, int64_t count) const {
    const int64_t visible = task_.prefix_length[query / task_.heads] - base;
    return visible < 0 ? 0 : visible < count ? visible : count;
  }

  float* score_at(int64_t query, int64_t column) {
    return s_.scores + (column / kOutputs * queries_ + query) * kOutputs + column % kOutputs;
  }

  void scale_down() {
    for (int64_t p = 0; p < head_panels(); ++p) {
      for (int64_t i = 0; i < queries_; ++i) {
        float* total = s_.total + (p * queries_ + i) * kOutputs;
        const Simd::F factor = Simd::set(s_.factors[i]);
        Simd::store(total, Simd::mul(Simd::load(total), factor));
        Simd::store(total + Simd::kLanes, Simd::mul(Simd::load(total + Simd::kLanes), factor));
      }
    }
  }

  void write_out() {
    for (int64_t r = 0; r < task_.rows; ++r) {
      for (int64_t h = 0; h < task_.heads; ++h) {
        const int64_t i = r * task_.heads + h;
        const Simd::F inverse = Simd::set(s_.sum[i] == 0.0f ? 0.0f : 1.0f / s_.sum[i]);
        float* out = task_.out + r * task_.out_stride + h * task_.head_dim;
        for (int64_t d = 0; d < task_.head_dim; d += Simd::kLanes) {
          const float* total = s_.total + (d / kOutputs * queries_ + i) * kOutputs + d % kOutputs;
          Simd::store_partial(out + d, Simd::mul(Simd::load(total), inverse), task_.head_dim - d);
        }
      }
    }
  }

  const AttentionTask& task_;
  PromptAttentionScratch& s_;
  int64_t queries_;
};

inline void prompt_attention(const AttentionTask& task) { PromptTile(task).run(); }

}  // namespace frspec::cpu::FRSPEC_ISA
