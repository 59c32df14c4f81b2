// Matrix products with vdpbf16ps, which multiplies pairs of bf16 and adds to fp32. Weights are bf16
// as they are. An activation goes in as the sum of two bf16, x = high + low + error with
// |error| <= 2^-17 |x|, each with its own vdpbf16ps: the products are exact, and the result is
// close to that of fp32 activations (as far apart as two orders of summation are). vdpbf16ps takes
// subnormal inputs and results as 0.
#pragma once

#include "cpu/multiply_tile.h"

namespace frspec::cpu::FRSPEC_ISA {

struct BF16PairWeights {
  struct X {
    __m512 high;
    __m512 low;
  };
  static constexpr int kGroup = 2;
  static constexpr int64_t kRowBytes = 2 * Simd::kLanes * 2;

  // x: what prepare_row wrote for a pair of k.
  static FRSPEC_INLINE X spread(const float* x) { return {Simd::set(x[0]), Simd::set(x[1])}; }
  static FRSPEC_INLINE void load(const char* p, Simd::F& a, Simd::F& b) {
    a = Simd::load(reinterpret_cast<const float*>(p));
    b = Simd::load(reinterpret_cast<const float*>(p) + Simd::kLanes);
  }
  static FRSPEC_INLINE Simd::F multiply_add(const X& x, Simd::F weights, Simd::F sum) {
    return dot(dot(sum, x.high, weights), x.low, weights);
  }

 private:
  static FRSPEC_INLINE Simd::F dot(Simd::F sum, __m512 x, __m512 weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)weights);
  }
};

// The nearest bf16, ties to even, in the upper half of the result.
FRSPEC_INLINE uint32_t round_to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000u) != 0x7f800000u)
    bits += 0x7fffu + ((bits >> 16) & 1u);
  else if ((bits & 0x7fffffu) != 0)
    bits |= 0x400000u;  // NaN stays NaN
  return bits & 0xffff0000u;
}

// prepared[2 i] holds the high parts of x[2 i] (lower half) and x[2 i + 1], prepared[2 i + 1] their
// low parts.
inline void prepare_row(void* prepared, const float* x, int64_t depth) {
  uint32_t* to = static_cast<uint32_t*>(prepared);
  for (int64_t k = 0; k < depth; k += 2) {
    uint32_t high[2] = {0, 0};
    uint32_t low[2] = {0, 0};
    for (int64_t i = 0; i < 2 && k + i < depth; ++i) {
      high[i] = round_to_bf16(x[k + i]);
      float part;
      __builtin_memcpy(&part, &high[i], sizeof(part));
      // Of an infinite or NaN part there is nothing left to add.
      if ((high[i] & 0x7f800000u) != 0x7f800000u) low[i] = round_to_bf16(x[k + i] - part);
    }
    to[k] = high[0] >> 16 | high[1];
    to[k + 1] = low[0] >> 16 | low[1];
  }
}

constexpr PanelLayout pairs_layout() {
  PanelLayout layout{};
  layout.group = 2;
  for (int64_t j = 0; j < 2 * Simd::kLanes; ++j) layout.column[j] = 2 * j;
  return layout;
}

}  // namespace frspec::cpu::FRSPEC_ISA
