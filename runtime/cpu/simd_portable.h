// Vectors of 8 floats from the compiler's vector extensions: any CPU, any instruction set.
// The interface of every simd_*.h is the struct Simd; kernels are written over it alone.
#pragma once

#include <cstdint>

#define FRSPEC_INLINE inline __attribute__((always_inline))

namespace frspec::cpu::FRSPEC_ISA {

struct Simd {
  typedef float F __attribute__((vector_size(32)));
  typedef float LooseF __attribute__((vector_size(32), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef uint16_t H __attribute__((vector_size(16)));
  typedef uint32_t LooseU __attribute__((vector_size(32), aligned(2), may_alias));
  typedef uint16_t LooseH __attribute__((vector_size(16), aligned(2), may_alias));

  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 4;   // rows of a register tile two vectors wide
  static constexpr int kRowPanels = 2;  // panels of a register tile of one row

  static FRSPEC_INLINE F zero() { return F{}; }
  static FRSPEC_INLINE F set(float value) { return F{} + value; }
  static FRSPEC_INLINE F load(const float* p) { return *reinterpret_cast<const LooseF*>(p); }
  static FRSPEC_INLINE void store(float* p, F v) { *reinterpret_cast<LooseF*>(p) = v; }
  static FRSPEC_INLINE F load_partial(const float* p, int64_t count) {
    F v{};
    for (int64_t i = 0; i < count && i < kLanes; ++i) v[i] = p[i];
    return v;
  }
  static FRSPEC_INLINE void store_partial(float* p, F v, int64_t count) {
    for (int64_t i = 0; i < count && i < kLanes; ++i) p[i] = v[i];
  }
  static FRSPEC_INLINE F add(F a, F b) { return a + b; }
  static FRSPEC_INLINE F sub(F a, F b) { return a - b; }
  static FRSPEC_INLINE F mul(F a, F b) { return a * b; }
  static FRSPEC_INLINE F div(F a, F b) { return a / b; }
  static FRSPEC_INLINE F fma(F a, F b, F c) { return a * b + c; }  // a b + c
  // If one of a and b is NaN, the result is b.
  static FRSPEC_INLINE F max(F a, F b) { return a > b ? a : b; }
  static FRSPEC_INLINE F min(F a, F b) { return a < b ? a : b; }
  static FRSPEC_INLINE F zero_where_less(F v, F x, F bound) {
    return reinterpret_cast<F>(reinterpret_cast<I>(v) & ~(x < bound));
  }
  static FRSPEC_INLINE uint32_t greater_mask(F a, F b) {
    const I mask = a > b;
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
    return bits;
  }
  static FRSPEC_INLINE bool any_greater(F a, F b) {
    typedef int64_t Wide __attribute__((vector_size(32)));
    const Wide mask = reinterpret_cast<Wide>(a > b);
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
  }
  static FRSPEC_INLINE F round(F v) {  // |v| < 2^22
    const F magic = set(12582912.0f);
    return (v + magic) - magic;
  }
  static FRSPEC_INLINE F power_of_two(F n) {  // n integral in [-126, 127]
    return reinterpret_cast<F>((__builtin_convertvector(n, I) + 127) << 23);
  }
  static FRSPEC_INLINE float sum(F v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
  static FRSPEC_INLINE float maximum(F v) {
    float result = v[0];
    for (int i = 1; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
    return result;
  }

  // 16 bf16 as the packed panels hold them: 32-bit lane i is output i (low half) and i + 8 (high).
  static FRSPEC_INLINE void load_bf16(const void* p, F& low, F& high) {
    const U both = *reinterpret_cast<const LooseU*>(p);
    low = reinterpret_cast<F>(both << 16);
    high = reinterpret_cast<F>(both & 0xffff0000u);
  }
  static FRSPEC_INLINE F load_f16(const void* p) {
    const U half = __builtin_convertvector(*reinterpret_cast<const LooseH*>(p), U);
    const U magnitude = (half & 0x7fffu) << 13;
    const F scaled = reinterpret_cast<F>(magnitude) * 0x1p112f;  // subnormals come out right too
    const U special = reinterpret_cast<U>(magnitude >= 0x0f800000u) & 0x7f800000u;
    return reinterpret_cast<F>(reinterpret_cast<U>(scaled) | special | ((half & 0x8000u) << 16));
  }

  static FRSPEC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
};

}  // namespace frspec::cpu::FRSPEC_ISA
