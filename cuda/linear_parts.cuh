// Parts of a product (kernels.h), added in ascending order by whoever reads them.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace frspec::cuda {
namespace {

constexpr int kMaxParts = 8;

__device__ __forceinline__ float4 add(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// `parts` values, each part_stride behind the one before: all are asked for before any is added.
template <typename Value, typename Add>
__device__ __forceinline__ Value add_strided(const float* from, int parts, int64_t part_stride,
                                             const Add& add_two) {
  Value loaded[kMaxParts]{};
#pragma unroll
  for (int i = 0; i < kMaxParts; ++i) {
    if (i < parts) loaded[i] = __ldcg(reinterpret_cast<const Value*>(from + i * part_stride));
  }
  Value total = loaded[0];
#pragma unroll
  for (int i = 1; i < kMaxParts; ++i) {
    if (i < parts) total = add_two(total, loaded[i]);
  }
  return total;
}
__device__ __forceinline__ float4 add_four_parts(const float* from, int parts,
                                                 int64_t part_stride) {
  return add_strided<float4>(from, parts, part_stride,
                             [](const float4& a, const float4& b) { return add(a, b); });
}

// Output `column` of a row, before it is rounded.
template <typename T>
__device__ __forceinline__ float part_output(const LinearParts& p, int row, int column) {
  float value = add_strided<float>(p.sums + row * p.row_stride + column, p.parts, p.part_stride,
                                   [](float a, float b) { return a + b; });
  if (p.bias != nullptr) value += p.bias[column];
  if (p.residual != nullptr) {
    value += to_float(static_cast<const T*>(p.residual)[row * p.residual_stride + column]);
  }
  return value;
}

// Eight outputs, rounded; column a multiple of 8, all of them there.
template <typename T>
__device__ __forceinline__ uint4 part_outputs(const LinearParts& p, int row, int column) {
  const float* from = p.sums + row * p.row_stride + column;
  const float4 low = add_four_parts(from, p.parts, p.part_stride);
  const float4 high = add_four_parts(from + 4, p.parts, p.part_stride);
  float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (p.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] += p.bias[column + j];
  }
  if (p.residual != nullptr) {
    float added[8];
    unpack_eight<T>(*reinterpret_cast<const uint4*>(static_cast<const T*>(p.residual) +
                                                    row * p.residual_stride + column),
                    added);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] += added[j];
  }
  return pack_eight<T>(values);
}

}  // namespace
}  // namespace frspec::cuda
