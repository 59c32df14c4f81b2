// Attention for models in bf16, with vdpbf16ps: queries, keys, values and softmax weights are
// rounded to bf16, products are summed in fp32, at twice the rate of attention_kernel.h.
//
// The cache keeps keys and values as the weights of a linear are packed (PairedKv in kv_layout.h),
// so that both products are multiply(). Within a split the softmax is the running one of
// FlashAttention (arXiv 2205.14135): what is summed so far is scaled down when a block brings a
// larger score. Positions are multiplied in pairs of logical positions, so a result depends on the
// row's query and the keys and values at its logical positions alone, as in attention_kernel.h.
#pragma once

#include "cpu/attention_tile.h"
#include "cpu/bf16_pairs_kernel.h"
#include "cpu/linear_kernel.h"

namespace frspec::cpu::FRSPEC_ISA {

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

  static constexpr int64_t kOutputs = kKvPanel;
  static_assert(kKvPanel == 2 * Simd::kLanes);
  static constexpr int64_t kValuePanel = kKvBlock / 2 * Weights::kGroupBytes;
  static constexpr int64_t kWeightStride = kKvBlock / 2;
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2 = 0.69314718f;

  int64_t query_stride() const { return task_.head_dim / 2; }
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
      multiply<Weights>({values_at(base, 0), kValuePanel, head_panels(), s_.weights, kWeightStride,
                         queries_, shared, s_.block, true});
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

  // Columns around first ... end - 1 hold whatever the cache does.
  void score_slots(int64_t base, int64_t first, int64_t end) {
    first = first / kOutputs * kOutputs;
    const int64_t panel = task_.head_dim / 2 * Weights::kGroupBytes;
    const char* keys = static_cast<const char*>(task_.keys) + (base + first) / kOutputs * panel;
    multiply<Weights>({keys, panel, (end - first + kOutputs - 1) / kOutputs, s_.q, query_stride(),
                       queries_, task_.head_dim, s_.scores + first * queries_});
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

  // Where the pair that a slot belongs to has element d of its values: PairedKv::value, which these
  // kernels may not call (kernels.h).
  const char* values_at(int64_t slot, int64_t d) const {
    const int64_t block = slot / kKvBlock * head_panels() + d / kOutputs;
    return static_cast<const char*>(task_.values) + block * kValuePanel +
           slot % kKvBlock / 2 * Weights::kGroupBytes + d % kOutputs * 4;
  }

  // Elements d ... d + lanes - 1 of the values of two slots, by pairs; of one and zeros if there is
  // no second (-1).
  Simd::F value_pairs(int64_t slot, int64_t second, int64_t d) const {
    const __m512i one = _mm512_loadu_si512(values_at(slot, d));
    __m512i pairs = slot % 2 == 0 ? _mm512_and_si512(one, _mm512_set1_epi32(0xffff))
                                  : _mm512_srli_epi32(one, 16);
    if (second >= 0) {
      const __m512i other = _mm512_loadu_si512(values_at(second, d));
      const __m512i high = second % 2 == 0 ? _mm512_slli_epi32(other, 16)
                                           : _mm512_andnot_si512(_mm512_set1_epi32(0xffff), other);
      pairs = _mm512_or_si512(pairs, high);
    }
    return _mm512_castsi512_ps(pairs);
  }

  // Adds the weighted values of positions first ... end - 1 of the block to row r's sums; first is
  // even.
  void weigh_own(int64_t r, int64_t base, int64_t first, int64_t end) {
    for (int64_t d = 0; d < task_.head_dim; d += Simd::kLanes) {
      for (int64_t j = first; j < end; j += 2) {
        const int64_t second = j + 1 < end ? slot_at(r, base + j + 1) : -1;
        Simd::store(s_.packed + j / 2 * Simd::kLanes, value_pairs(slot_at(r, base + j), second, d));
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
