// How the sums of a product become outputs (linear.cu): parts of k are added, then bias and
// residual, or the two halves of swiglu are multiplied.
#pragma once

#include "linear_params.cuh"

namespace frspec::cuda {
namespace {

__device__ __forceinline__ float4 add(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

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

// The finished tile: load(token, row) gives the sums of tile rows row ... row + 3. A thread loads
// for kBatch times four outputs before it stores any, because what it loads comes from far away.
template <typename T, typename Out, bool kSwiglu, int kBatch, typename Load>
__device__ __forceinline__ void store_tile(const LinearParams& p, int tile, int first_token,
                                           int tokens, const Load& load) {
  constexpr int kQuads = kTileOutputs<kSwiglu> / 4;
  const int count = tokens * kQuads;
  for (int begin = threadIdx.x; begin < count; begin += kThreads * kBatch) {
    float4 sums[kBatch]{};
    float4 others[kBatch]{};  // residual, or the up half of swiglu
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * kThreads;
      const int quad = i % kQuads;
      const int first = tile * kTileOutputs<kSwiglu> + quad * 4;
      if (i >= count || first >= p.out_features) continue;
      if constexpr (kSwiglu) {
        const int row = quad / 4 * 32 + quad % 4 * 4;
        sums[b] = add(load(i / kQuads, row), load_bias(p, p.bias, first));
        others[b] = add(load(i / kQuads, row + 16), load_bias(p, p.up_bias, first));
      } else {
        others[b] = load_residual<T>(p, first_token + i / kQuads, first);
        sums[b] = add(load(i / kQuads, quad * 4), load_bias(p, p.bias, first));
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * kThreads;
      const int first = tile * kTileOutputs<kSwiglu> + i % kQuads * 4;
      if (i >= count || first >= p.out_features) continue;
      const float4& s = sums[b];
      const float4& o = others[b];
      store_outputs<Out>(
          p, first_token + i / kQuads, first,
          kSwiglu ? make_float4(silu(s.x) * o.x, silu(s.y) * o.y, silu(s.z) * o.z, silu(s.w) * o.w)
                  : add(s, o));
    }
  }
}

// Adds the parts of a tile in ascending order. kMost: at least p.parts, so that all of a sum's
// loads are under way at once.
template <typename T, typename Out, bool kSwiglu, int kMost>
__device__ __forceinline__ void store_parts(const LinearParams& p, int tile, int first_token,
                                            int tokens, const float* partial, int64_t part_floats) {
  constexpr int kBatch = (kSwiglu ? 8 : 16) / kMost;
  store_tile<T, Out, kSwiglu, kBatch>(p, tile, first_token, tokens, [&](int token, int row) {
    const float* from = partial + token * kTileRows + row;
    float4 parts[kMost]{};
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i < p.parts) parts[i] = __ldcg(reinterpret_cast<const float4*>(from + i * part_floats));
    }
    float4 total = parts[0];
#pragma unroll
    for (int i = 1; i < kMost; ++i) {
      if (i < p.parts) total = add(total, parts[i]);
    }
    return total;
  });
}

}  // namespace
}  // namespace frspec::cuda
