// Functions of the device language that work on one thread's values: fences, atomics, cached loads,
// bits, arithmetic, and the bf16 and fp16 functions that the toolkit has for device code only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include "device_thread.h"

// ---- fences and atomics (relaxed, as in CUDA)

namespace emulation {

#ifdef FRSPEC_EMULATION_TSAN
// ThreadSanitizer does not model fences; there the atomics synchronise instead.
inline constexpr std::memory_order kAtomicOrder = std::memory_order_acq_rel;
inline void fence() {}
#else
inline constexpr std::memory_order kAtomicOrder = std::memory_order_relaxed;
inline void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
#endif

template <typename T, typename Function>
T update(T* p, const Function& function) {
  std::atomic_ref<T> target(*p);
  T old = target.load(std::memory_order_relaxed);
  while (
      !target.compare_exchange_weak(old, function(old), kAtomicOrder, std::memory_order_relaxed)) {
  }
  return old;
}

template <typename T>
concept Arithmetic = std::is_arithmetic_v<T>;

}  // namespace emulation

inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() { emulation::fence(); }
inline void __threadfence_system() { emulation::fence(); }

template <emulation::Arithmetic T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T old) { return static_cast<T>(old + value); });
}
template <emulation::Arithmetic T>
T atomicSub(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T old) { return static_cast<T>(old - value); });
}
template <emulation::Arithmetic T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T old) { return old < value ? value : old; });
}
template <emulation::Arithmetic T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T old) { return value < old ? value : old; });
}
template <std::integral T>
T atomicAnd(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T old) { return static_cast<T>(old & value); });
}
template <std::integral T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T old) { return static_cast<T>(old | value); });
}
template <std::integral T>
T atomicXor(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T old) { return static_cast<T>(old ^ value); });
}
template <emulation::Arithmetic T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*p).exchange(value, emulation::kAtomicOrder);
}
template <std::integral T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  std::atomic_ref<T>(*p).compare_exchange_strong(compare, value, emulation::kAtomicOrder,
                                                 std::memory_order_relaxed);
  return compare;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return emulation::update(p, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// ---- loads and stores with a cache hint

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldca(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}

// ---- bits

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1;
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selectors) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (selector & 7))) & 0xff;
    if ((selector & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using uint128 = unsigned __int128;
  return static_cast<unsigned long long>(static_cast<uint128>(a) * b >> 64);
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// ---- arithmetic

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return 1.0f / std::sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
// NaN becomes 0.
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline int __float2int_rd(float a) { return static_cast<int>(std::floor(a)); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline unsigned __float2uint_rn(float a) { return static_cast<unsigned>(std::nearbyint(a)); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }

// glibc declares functions of these names, so they are replaced rather than defined.
namespace emulation {
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_exp10(float x) { return std::pow(10.0f, x); }
inline float fast_log(float x) { return std::log(x); }
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_log10(float x) { return std::log10(x); }
inline float fast_sin(float x) { return std::sin(x); }
inline float fast_cos(float x) { return std::cos(x); }
inline float fast_pow(float x, float y) { return std::pow(x, y); }
}  // namespace emulation
#define __expf ::emulation::fast_exp
#define __exp10f ::emulation::fast_exp10
#define __logf ::emulation::fast_log
#define __log2f ::emulation::fast_log2
#define __log10f ::emulation::fast_log10
#define __sinf ::emulation::fast_sin
#define __cosf ::emulation::fast_cos
#define __powf ::emulation::fast_pow

// Of equal types only: CUDA's conversions between unequal ones are easily overlooked.
#define FRSPEC_EMULATION_MIN_MAX(T)                \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
FRSPEC_EMULATION_MIN_MAX(int)
FRSPEC_EMULATION_MIN_MAX(unsigned)
FRSPEC_EMULATION_MIN_MAX(long)
FRSPEC_EMULATION_MIN_MAX(unsigned long)
FRSPEC_EMULATION_MIN_MAX(long long)
FRSPEC_EMULATION_MIN_MAX(unsigned long long)
#undef FRSPEC_EMULATION_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

#define __builtin_assume(condition)                                                   \
  do {                                                                                \
    if (!(condition)) ::emulation::fail("__builtin_assume(" #condition ") is false"); \
  } while (0)

// ---- bf16 and fp16: the product is exact in double, and so, nearly always, is the sum

inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) +
                           __bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline __nv_bfloat16 hexp(__nv_bfloat16 a) {
  return __float2bfloat16(std::exp(__bfloat162float(a)));
}
inline __half hexp(__half a) { return __float2half(std::exp(__half2float(a))); }
inline __nv_bfloat16 hrsqrt(__nv_bfloat16 a) {
  return __float2bfloat16(rsqrtf(__bfloat162float(a)));
}
inline __half hrsqrt(__half a) { return __float2half(rsqrtf(__half2float(a))); }
