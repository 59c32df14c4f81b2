// Vectors of 16 floats with AVX-512 F, BW, VL and DQ. The interface is that of simd_portable.h.
#pragma once

#ifndef FRSPEC_EMULATE_AVX512
#include <immintrin.h>
#endif

#include <cstdint>

#define FRSPEC_INLINE inline __attribute__((always_inline))

namespace frspec::cpu::FRSPEC_ISA {

struct Simd {
  using F = __m512;

  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 12;
  static constexpr int kRowPanels = 1;

  static FRSPEC_INLINE F zero() { return _mm512_setzero_ps(); }
  static FRSPEC_INLINE F set(float value) { return _mm512_set1_ps(value); }
  static FRSPEC_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static FRSPEC_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static FRSPEC_INLINE __mmask16 lane_mask(int64_t count) {
    return count < kLanes ? static_cast<__mmask16>((1u << count) - 1) : __mmask16{0xffff};
  }
  static FRSPEC_INLINE F load_partial(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(lane_mask(count), p);
  }
  static FRSPEC_INLINE void store_partial(float* p, F v, int64_t count) {
    _mm512_mask_storeu_ps(p, lane_mask(count), v);
  }
  static FRSPEC_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static FRSPEC_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static FRSPEC_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static FRSPEC_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static FRSPEC_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static FRSPEC_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static FRSPEC_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static FRSPEC_INLINE F zero_where_less(F v, F x, F bound) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~_mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ)),
                               v);
  }
  static FRSPEC_INLINE uint32_t greater_mask(F a, F b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
  }
  static FRSPEC_INLINE bool any_greater(F a, F b) { return greater_mask(a, b) != 0; }
  static FRSPEC_INLINE F round(F v) {  // |v| < 2^22
    const F magic = set(12582912.0f);
    return sub(add(v, magic), magic);
  }
  static FRSPEC_INLINE F power_of_two(F n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }
  static FRSPEC_INLINE float sum(F v) {
    const __m256 eight = _mm256_add_ps(lower(v), upper(v));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static FRSPEC_INLINE float maximum(F v) {
    const __m256 eight = _mm256_max_ps(lower(v), upper(v));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }

  static FRSPEC_INLINE void load_bf16(const void* p, F& low, F& high) {
    const __m512i both = _mm512_loadu_si512(p);
    low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    high = _mm512_castsi512_ps(
        _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static FRSPEC_INLINE F load_f16(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }

  static FRSPEC_INLINE __m256 lower(F v) { return _mm512_castps512_ps256(v); }
  static FRSPEC_INLINE __m256 upper(F v) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  }

  static FRSPEC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
};

}  // namespace frspec::cpu::FRSPEC_ISA
