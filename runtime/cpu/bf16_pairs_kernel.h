// Matrix products with vdpbf16ps, which multiplies pairs of bf16 and adds both products to fp32.
// Weights are bf16 as they are; activations are rounded to bf16 (nearest even) on their way in.
// That doubles the rate of fp32 multiply-adds, which is what the verification of a tree is bound
// by. vdpbf16ps takes subnormal inputs and results as 0.
#pragma once

#include "cpu/multiply_tile.h"

namespace frspec::cpu::FRSPEC_ISA {

struct BF16PairWeights {
  static constexpr int kGroup = 2;
  static constexpr int64_t kGroupBytes = 2 * Simd::kLanes * 4;
  static FRSPEC_INLINE void load(const char* p, Simd::F& a, Simd::F& b) {
    a = Simd::load(reinterpret_cast<const float*>(p));
    b = Simd::load(reinterpret_cast<const float*>(p) + Simd::kLanes);
  }
  static FRSPEC_INLINE Simd::F multiply_add(Simd::F x, Simd::F weights, Simd::F sum) {
    return _mm512_dpbf16_ps(sum, pairs(x), pairs(weights));
  }

 private:
  static FRSPEC_INLINE __m512bh pairs(Simd::F v) {
#if defined(__clang__) && __clang_major__ == 16
    asm("" : "+v"(v));  // Clang 16 crashes where it sees that bf16 pairs come from a broadcast
#endif
    __m512bh result;
    __builtin_memcpy(&result, &v, sizeof(result));
    return result;
  }
};

inline void round_rows(uint16_t* out, int64_t out_stride, const float* x, int64_t x_stride,
                       int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x + r * x_stride;
    uint16_t* to = out + r * out_stride;
    int64_t k = 0;
    for (; k + Simd::kLanes <= cols; k += Simd::kLanes) {
      const __m256bh rounded = _mm512_cvtneps_pbh(Simd::load(from + k));
      __builtin_memcpy(to + k, &rounded, sizeof(rounded));
    }
    if (k < cols) {
      const __m256bh rounded = _mm512_cvtneps_pbh(Simd::load_partial(from + k, cols - k));
      __builtin_memcpy(to + k, &rounded, static_cast<size_t>((cols - k + 1) / 2) * 4);
    }
  }
}

constexpr PanelLayout pairs_layout() {
  PanelLayout layout{};
  layout.group = 2;
  for (int64_t j = 0; j < 2 * Simd::kLanes; ++j) layout.column[j] = 2 * j;
  return layout;
}

}  // namespace frspec::cpu::FRSPEC_ISA
