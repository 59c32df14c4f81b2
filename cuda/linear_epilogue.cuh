// How the sums of a product become outputs (linear.cu): bias and residual are added, or the two
// halves of swiglu are multiplied.
#pragma once

#include "linear_params.cuh"

namespace frspec::cuda {
namespace {

template <typename T>
__device__ __forceinline__ float4 load_four(const T* from) {  // aligned to 4 elements
  const uint2 packed = *reinterpret_cast<const uint2*>(from);
  const float2 low = unpack_pair<T>(packed.x);
  const float2 high = unpack_pair<T>(packed.y);
  return make_float4(low.x, low.y, high.x, high.y);
}
__device__ __forceinline__ void store_four(float* to, const float4& v) {
  *reinterpret_cast<float4*>(to) = v;
}
template <typename T>
__device__ __forceinline__ void store_four(T* to, const float4& v) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack_pair<T>(v.x, v.y), pack_pair<T>(v.z, v.w));
}

// bias[first ... first + 3], zeros behind the end.
__device__ __forceinline__ float4 load_bias(const LinearParams& p, const float* bias, int first) {
  float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (bias == nullptr) return four;
  four.x = bias[first];
  if (first + 1 < p.out_features) four.y = bias[first + 1];
  if (first + 2 < p.out_features) four.z = bias[first + 2];
  if (first + 3 < p.out_features) four.w = bias[first + 3];
  return four;
}

template <typename T>
__device__ __forceinline__ float4 load_residual(const LinearParams& p, int token, int first) {
  float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (p.residual == nullptr) return four;
  const T* from = static_cast<const T*>(p.residual) + token * p.residual_stride + first;
  if (p.quads) return load_four(from);
  four.x = to_float(from[0]);
  if (first + 1 < p.out_features) four.y = to_float(from[1]);
  if (first + 2 < p.out_features) four.z = to_float(from[2]);
  if (first + 3 < p.out_features) four.w = to_float(from[3]);
  return four;
}

template <typename Out>
__device__ __forceinline__ void store_outputs(const LinearParams& p, int token, int first,
                                              const float4& v) {
  Out* out = static_cast<Out*>(p.out) + token * p.out_stride + first;
  if (p.quads) return store_four(out, v);
  out[0] = from_float<Out>(v.x);
  if (first + 1 < p.out_features) out[1] = from_float<Out>(v.y);
  if (first + 2 < p.out_features) out[2] = from_float<Out>(v.z);
  if (first + 3 < p.out_features) out[3] = from_float<Out>(v.w);
}

// Four outputs of a token, from `first` on. sums(row) gives those of four rows of the tile that
// begin with row `row` of it: gate and up rows of swiglu lie 16 apart.
template <typename T, typename Out, bool kSwiglu, typename Sums>
__device__ __forceinline__ void store_quad(const LinearParams& p, int token, int first,
                                           const Sums& sums) {
  const int at = first % kTileOutputs<kSwiglu>;
  if constexpr (kSwiglu) {
    const int row = at / 16 * 32 + at % 16;
    const float4 g = add(sums(row), load_bias(p, p.bias, first));
    const float4 u = add(sums(row + 16), load_bias(p, p.up_bias, first));
    store_outputs<Out>(
        p, token, first,
        make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w));
  } else {
    const float4 residual = load_residual<T>(p, token, first);
    store_outputs<Out>(p, token, first, add(add(sums(at), load_bias(p, p.bias, first)), residual));
  }
}

}  // namespace
}  // namespace frspec::cuda
