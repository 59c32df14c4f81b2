// Vectors of 8 floats with AVX2, FMA and F16C. The interface is that of simd_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define FRSPEC_INLINE inline __attribute__((always_inline))

namespace frspec::cpu::FRSPEC_ISA {

struct Simd {
  using F = __m256;

  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 6;
  static constexpr int kRowPanels = 2;

  static FRSPEC_INLINE F zero() { return _mm256_setzero_ps(); }
  static FRSPEC_INLINE F set(float value) { return _mm256_set1_ps(value); }
  static FRSPEC_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static FRSPEC_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static FRSPEC_INLINE __m256i lane_mask(int64_t count) {
    const int lanes = count < kLanes ? static_cast<int>(count) : kLanes;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FRSPEC_INLINE F load_partial(const float* p, int64_t count) {
    return _mm256_maskload_ps(p, lane_mask(count));
  }
  static FRSPEC_INLINE void store_partial(float* p, F v, int64_t count) {
    _mm256_maskstore_ps(p, lane_mask(count), v);
  }
  static FRSPEC_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static FRSPEC_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static FRSPEC_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static FRSPEC_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static FRSPEC_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static FRSPEC_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static FRSPEC_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static FRSPEC_INLINE F zero_where_less(F v, F x, F bound) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, bound, _CMP_LT_OQ), v);
  }
  static FRSPEC_INLINE uint32_t greater_mask(F a, F b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static FRSPEC_INLINE bool any_greater(F a, F b) { return greater_mask(a, b) != 0; }
  static FRSPEC_INLINE F round(F v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static FRSPEC_INLINE F power_of_two(F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static FRSPEC_INLINE float sum(F v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static FRSPEC_INLINE float maximum(F v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }

  static FRSPEC_INLINE void load_bf16(const void* p, F& low, F& high) {
    const __m256i both = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    high = _mm256_castsi256_ps(
        _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static FRSPEC_INLINE F load_f16(const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }

  static FRSPEC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
};

}  // namespace frspec::cpu::FRSPEC_ISA
