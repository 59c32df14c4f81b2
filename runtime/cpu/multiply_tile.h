// The register tile under linear and attention: M rows of x times two vectors of outputs.
//
// Every output is one fp32 accumulator, summed over k ascending, whatever M is: that makes a row's
// result independent of the rows beside it. An accumulator may be stored and loaded between blocks
// of k; fp32 stores are exact.
#pragma once

#include "cpu/kernels.h"

namespace frspec::cpu::FRSPEC_ISA {

// Weights of the linear panels: two vectors of outputs for each group of kGroup values of k. Of x a
// group is 32 bits, spread over all lanes.
struct PlainWeights {
  static constexpr int kGroup = 1;
  static FRSPEC_INLINE Simd::F multiply_add(Simd::F x, Simd::F weights, Simd::F sum) {
    return Simd::fma(x, weights, sum);
  }
};

struct BF16Weights : PlainWeights {
  static constexpr int64_t kGroupBytes = 2 * Simd::kLanes * 2;
  static FRSPEC_INLINE void load(const char* p, Simd::F& a, Simd::F& b) {
    Simd::load_bf16(p, a, b);
  }
};

struct F16Weights : PlainWeights {
  static constexpr int64_t kGroupBytes = 2 * Simd::kLanes * 2;
  static FRSPEC_INLINE void load(const char* p, Simd::F& a, Simd::F& b) {
    a = Simd::load_f16(p);
    b = Simd::load_f16(p + Simd::kLanes * 2);
  }
};

struct F32Weights : PlainWeights {
  static constexpr int64_t kGroupBytes = 2 * Simd::kLanes * 4;
  static FRSPEC_INLINE void load(const char* p, Simd::F& a, Simd::F& b) {
    a = Simd::load(reinterpret_cast<const float*>(p));
    b = Simd::load(reinterpret_cast<const float*>(p) + Simd::kLanes);
  }
};

// Groups of k that a tile takes at a time: two cache lines of weights. No more: requests for later
// weights, spread evenly, let arithmetic and memory overlap best (docs/cpu.md).
template <typename Weights>
constexpr int64_t kStepGroups = 128 / Weights::kGroupBytes;

// out[p][r] (+)= x[r] . panel p, for M rows and N panels, over `groups` groups of k. With each step
// of kStepGroups it asks for kLines cache lines more, from `next` on.
template <typename Weights, int M, int N, int kLines = 0>
FRSPEC_INLINE void multiply_tile(const char* weights, int64_t panel_bytes, const float* x,
                                 int64_t x_stride, int64_t groups, float* out,
                                 int64_t out_panel_stride, bool accumulate, const char* next) {
  using F = Simd::F;
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  F sum[N][M][2];
#pragma GCC unroll 16
  for (int p = 0; p < N; ++p) {
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      const float* from = out + p * out_panel_stride + r * kOutputs;
      sum[p][r][0] = accumulate ? Simd::load(from) : Simd::zero();
      sum[p][r][1] = accumulate ? Simd::load(from + Simd::kLanes) : Simd::zero();
    }
  }
  const auto step = [&](const char* w, const float* xk) __attribute__((always_inline)) {
    F spread[M];
    if constexpr (N > 1) {
#pragma GCC unroll 16
      for (int r = 0; r < M; ++r) spread[r] = Simd::set(xk[r * x_stride]);
    }
#pragma GCC unroll 16
    for (int p = 0; p < N; ++p) {
      F a, b;
      Weights::load(w + p * panel_bytes, a, b);
#pragma GCC unroll 16
      for (int r = 0; r < M; ++r) {
        const F value = N > 1 ? spread[r] : Simd::set(xk[r * x_stride]);
        sum[p][r][0] = Weights::multiply_add(value, a, sum[p][r][0]);
        sum[p][r][1] = Weights::multiply_add(value, b, sum[p][r][1]);
      }
    }
  };
  constexpr int64_t kStep = kStepGroups<Weights>;
  int64_t group = 0;
  for (; group + kStep <= groups; group += kStep) {
#pragma GCC unroll 2
    for (int line = 0; line < kLines; ++line) Simd::prefetch(next + line * 64);
    next += kLines * 64;
#pragma GCC unroll 4
    for (int64_t u = 0; u < kStep; ++u) step(weights + u * Weights::kGroupBytes, x + u);
    weights += kStep * Weights::kGroupBytes;
    x += kStep;
  }
  for (; group < groups; ++group) {
    step(weights, x);
    weights += Weights::kGroupBytes;
    ++x;
  }
#pragma GCC unroll 16
  for (int p = 0; p < N; ++p) {
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      float* to = out + p * out_panel_stride + r * kOutputs;
      Simd::store(to, sum[p][r][0]);
      Simd::store(to + Simd::kLanes, sum[p][r][1]);
    }
  }
}

}  // namespace frspec::cpu::FRSPEC_ISA
