// What kernels are written with: the few macros that hide the difference between nvcc and the
// emulation of tests/emulation, and the 16-bit element types.
//
// Rules that let a kernel run in both: launch<kernel>(), never <<<>>>; shared memory through SHARED
// and SmemCarver; inline PTX only in ptx.cuh and hopper.cuh; block sizes are multiples of 32; all
// lanes of a mask reach the same line; no barrier after some threads have left.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifdef FRSPEC_EMULATE_CUDA
#include "cuda_emulation.h"

// SHARED(float, sums, [8]): one object for each block.
#define SHARED(T, name, ...)                                       \
  static char shared_key_##name;                                   \
  auto& name = *static_cast<std::type_identity_t<T __VA_ARGS__>*>( \
      ::emulation::shared_static(&shared_key_##name, sizeof(T __VA_ARGS__), alignof(T), #name))

namespace frspec::cuda {
// Typed pieces of the dynamic shared memory, each aligned to 128 bytes.
struct SmemCarver {
  SmemCarver() { ::emulation::restart_carving(); }
  template <typename T>
  T* take(int count) {
    return static_cast<T*>(::emulation::carve_dynamic(sizeof(T) * static_cast<size_t>(count)));
  }
};
}  // namespace frspec::cuda

#else

#define SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__

namespace frspec::cuda {
extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
struct SmemCarver {
  unsigned char* next;
  __device__ SmemCarver() : next(dynamic_shared_memory) {}
  template <typename T>
  __device__ T* take(int count) {
    T* piece = reinterpret_cast<T*>(next);
    next += (sizeof(T) * count + 127) / 128 * 128;
    return piece;
  }
};
}  // namespace frspec::cuda
#endif

namespace frspec::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What SmemCarver::take uses up.
constexpr size_t carved_bytes(size_t bytes) { return (bytes + 127) / 128 * 128; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

// Two elements in 32 bits, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<bf16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack_pair<fp16>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// Eight elements of 16 bytes.
template <typename T>
__device__ __forceinline__ void unpack_eight(const uint4& packed, float (&values)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_pair<T>(words[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}
template <typename T>
__device__ __forceinline__ uint4 pack_eight(const float (&values)[8]) {
  return make_uint4(pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3]),
                    pack_pair<T>(values[4], values[5]), pack_pair<T>(values[6], values[7]));
}

__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }

// Sums and maxima over the 32 lanes, the same bits in all of them.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// Unsigned integers in the order of the floats; NaN lowest, -0 equal to +0.
__device__ __forceinline__ uint32_t order_key(float value) {
  if (value != value) return 0;
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace frspec::cuda
