// SIMDe under the names of the AVX-512 intrinsics, with the few that Debian 12's version lacks.
#pragma once

#define FRSPEC_EMULATE_AVX512
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/convert.h"

using __mmask16 = simde__mmask16;

inline simde__m512 emulated_maskz_loadu_ps(__mmask16 mask, const float* p) {
  float lanes[16] = {};
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) lanes[i] = p[i];
  }
  return simde_mm512_loadu_ps(lanes);
}

inline void emulated_mask_storeu_ps(float* p, __mmask16 mask, simde__m512 v) {
  float lanes[16];
  simde_mm512_storeu_ps(lanes, v);
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) p[i] = lanes[i];
  }
}

inline simde__m512i emulated_cvtps_epi32(simde__m512 v) {
  float lanes[16];
  int32_t rounded[16];
  simde_mm512_storeu_ps(lanes, v);
  for (int i = 0; i < 16; ++i) rounded[i] = static_cast<int32_t>(std::nearbyint(lanes[i]));
  return simde_mm512_loadu_si512(rounded);
}

inline simde__m512 emulated_cvtph_ps(simde__m256i v) {
  uint16_t halves[16];
  float lanes[16];
  std::memcpy(halves, &v, sizeof(halves));
  frspec::cpu::convert(lanes, frspec::DType::kF32, halves, frspec::DType::kF16, 16);
  return simde_mm512_loadu_ps(lanes);
}

inline simde__m256bh emulated_cvtneps_pbh(simde__m512 v) {
  float lanes[16];
  uint16_t rounded[16];
  simde_mm512_storeu_ps(lanes, v);
  frspec::cpu::convert(rounded, frspec::DType::kBF16, lanes, frspec::DType::kF32, 16);
  simde__m256bh result;
  std::memcpy(&result, rounded, sizeof(result));
  return result;
}

#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
