// exp, silu, and passes over one row: sums, maxima, searches, root mean square, rotation.
#pragma once

#include "cpu/kernels.h"

namespace frspec::cpu::FRSPEC_ISA {

// e^x within about 2 ulp for x in [-87.33, 88]; 0 below, e^88 above; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial of degree 7.
FRSPEC_INLINE Simd::F exponential(Simd::F x) {
  using F = Simd::F;
  const F lowest = Simd::set(-87.33f);
  const F clamped = Simd::min(Simd::set(88.0f), Simd::max(lowest, x));
  const F n = Simd::round(Simd::mul(clamped, Simd::set(1.44269504088896341f)));
  F r = Simd::fma(n, Simd::set(-0.693359375f), clamped);  // ln 2 in two parts
  r = Simd::fma(n, Simd::set(2.12194440e-4f), r);
  F y = Simd::set(1.0f / 5040);
  y = Simd::fma(y, r, Simd::set(1.0f / 720));
  y = Simd::fma(y, r, Simd::set(1.0f / 120));
  y = Simd::fma(y, r, Simd::set(1.0f / 24));
  y = Simd::fma(y, r, Simd::set(1.0f / 6));
  y = Simd::fma(y, r, Simd::set(0.5f));
  y = Simd::fma(y, r, Simd::set(1.0f));
  y = Simd::fma(y, r, Simd::set(1.0f));
  return Simd::zero_where_less(Simd::mul(y, Simd::power_of_two(n)), x, lowest);
}

FRSPEC_INLINE Simd::F silu(Simd::F x) {
  const Simd::F e = exponential(Simd::sub(Simd::zero(), x));
  return Simd::div(x, Simd::add(Simd::set(1.0f), e));
}

inline float maximum(const float* x, int64_t count) {
  using F = Simd::F;
  constexpr float kLowest = -__builtin_inff();
  F best[4] = {Simd::set(kLowest), Simd::set(kLowest), Simd::set(kLowest), Simd::set(kLowest)};
  int64_t i = 0;
  for (; i + 4 * Simd::kLanes <= count; i += 4 * Simd::kLanes) {
    for (int u = 0; u < 4; ++u) {
      best[u] = Simd::max(Simd::load(x + i + u * Simd::kLanes), best[u]);
    }
  }
  for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
    best[0] = Simd::max(Simd::load(x + i), best[0]);
  }
  if (i < count && count >= Simd::kLanes) {  // some for the second time
    best[1] = Simd::max(Simd::load(x + count - Simd::kLanes), best[1]);
    i = count;
  }
  float result = Simd::maximum(Simd::max(Simd::max(best[0], best[1]), Simd::max(best[2], best[3])));
  for (; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

inline void exponentials(float* out, const float* x, int64_t count, float shift, float scale) {
  const Simd::F shifts = Simd::set(shift);
  const Simd::F scales = Simd::set(scale);
  for (int64_t i = 0; i < count; i += Simd::kLanes) {
    if (count - i >= Simd::kLanes) {
      const Simd::F value = Simd::mul(Simd::sub(Simd::load(x + i), shifts), scales);
      Simd::store(out + i, exponential(value));
    } else {
      const Simd::F value =
          Simd::mul(Simd::sub(Simd::load_partial(x + i, count - i), shifts), scales);
      Simd::store_partial(out + i, exponential(value), count - i);
    }
  }
}

inline float exp_sum(const float* x, int64_t count, float shift, float scale) {
  using F = Simd::F;
  const F shifts = Simd::set(shift);
  const F scales = Simd::set(scale);
  F sum[2] = {Simd::zero(), Simd::zero()};
  int64_t i = 0;
  for (; i + 2 * Simd::kLanes <= count; i += 2 * Simd::kLanes) {
    for (int u = 0; u < 2; ++u) {
      const F value = Simd::mul(Simd::sub(Simd::load(x + i + u * Simd::kLanes), shifts), scales);
      sum[u] = Simd::add(sum[u], exponential(value));
    }
  }
  float total = Simd::sum(Simd::add(sum[0], sum[1]));
  for (; i < count; ++i) {
    float value;
    exponentials(&value, x + i, 1, shift, scale);
    total += value;
  }
  return total;
}

inline int64_t find_greater(const float* x, int64_t begin, int64_t count, float bound) {
  const Simd::F bounds = Simd::set(bound);
  int64_t i = begin;
  for (; i + 4 * Simd::kLanes <= count; i += 4 * Simd::kLanes) {
    // maximum(x, bound) is bound where x is NaN
    const Simd::F a = Simd::max(Simd::load(x + i), bounds);
    const Simd::F b = Simd::max(Simd::load(x + i + Simd::kLanes), bounds);
    const Simd::F c = Simd::max(Simd::load(x + i + 2 * Simd::kLanes), bounds);
    const Simd::F d = Simd::max(Simd::load(x + i + 3 * Simd::kLanes), bounds);
    if (Simd::any_greater(Simd::max(Simd::max(a, b), Simd::max(c, d)), bounds)) break;
  }
  for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
    const uint32_t mask = Simd::greater_mask(Simd::load(x + i), bounds);
    if (mask != 0) return i + __builtin_ctz(mask);
  }
  for (; i < count; ++i) {
    if (x[i] > bound) return i;
  }
  return count;
}

// x >= bound is x > the float below bound.
inline int64_t find_not_less(const float* x, int64_t begin, int64_t count, float bound) {
  for (int64_t i = begin; i < count; ++i) {
    if (x[i] >= bound) return i;
    // -inf has no float below it, and one step of the plain search is enough for it.
    if (bound > -__builtin_inff()) {
      int32_t bits;
      __builtin_memcpy(&bits, &bound, sizeof(bits));
      if ((bits & 0x7fffffff) == 0) {
        bits = static_cast<int32_t>(0x80000001u);  // below +-0: the negative number nearest to 0
      } else {
        bits += bits < 0 ? 1 : -1;
      }
      float below;
      __builtin_memcpy(&below, &bits, sizeof(below));
      return find_greater(x, i, count, below);
    }
  }
  return count;
}

inline void rms_norm(float* out, const float* x, const float* weight, int64_t cols, float eps) {
  using F = Simd::F;
  F sum[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  int64_t i = 0;
  for (; i + 4 * Simd::kLanes <= cols; i += 4 * Simd::kLanes) {
    for (int u = 0; u < 4; ++u) {
      const F v = Simd::load(x + i + u * Simd::kLanes);
      sum[u] = Simd::fma(v, v, sum[u]);
    }
  }
  for (; i < cols; i += Simd::kLanes) {
    const F v = Simd::load_partial(x + i, cols - i);
    sum[0] = Simd::fma(v, v, sum[0]);
  }
  const float squares = Simd::sum(Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3])));
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(cols) + eps);
  const F scales = Simd::set(scale);
  for (i = 0; i + Simd::kLanes <= cols; i += Simd::kLanes) {
    Simd::store(out + i, Simd::mul(Simd::mul(Simd::load(x + i), scales), Simd::load(weight + i)));
  }
  for (; i < cols; ++i) out[i] = (x[i] * scale) * weight[i];
}

inline void add_silu(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += Simd::kLanes) {
    if (count - i >= Simd::kLanes) {
      Simd::store(x + i, Simd::add(Simd::load(x + i), silu(Simd::load(y + i))));
    } else {
      const Simd::F sum = Simd::add(Simd::load_partial(x + i, count - i),
                                    silu(Simd::load_partial(y + i, count - i)));
      Simd::store_partial(x + i, sum, count - i);
    }
  }
}

inline void rotate(float* out, const float* x, const float* cosines, const float* sines,
                   int64_t half) {
  using F = Simd::F;
  for (int64_t i = 0; i < half; i += Simd::kLanes) {
    const int64_t count = half - i;
    const F a = Simd::load_partial(x + i, count);
    const F b = Simd::load_partial(x + half + i, count);
    const F c = Simd::load_partial(cosines + i, count);
    const F s = Simd::load_partial(sines + i, count);
    const F minus_b = Simd::sub(Simd::zero(), b);
    Simd::store_partial(out + i, Simd::fma(a, c, Simd::mul(minus_b, s)), count);
    Simd::store_partial(out + half + i, Simd::fma(b, c, Simd::mul(a, s)), count);
  }
}

}  // namespace frspec::cpu::FRSPEC_ISA
