// What attention's warps do: 16 queries over a tile of keys and values in shared memory, through
// the tensor cores, and the softmax over tiles (arXiv 2205.14135).
#pragma once

#include <cmath>

#include "attention_params.cuh"

namespace frspec::cuda {
namespace {

// Softmax state of the 16 queries of a warp, in the layout of an mma accumulator: a lane has
// elements of queries lane / 4 and lane / 4 + 8.
template <int kDim>
struct WarpState {
  float values[kDim / 8][4];
  float max[2];
  float sum[2];  // of this lane's columns

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      values[d][0] = values[d][1] = values[d][2] = values[d][3] = 0.0f;
    }
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }
};

// While nothing is visible the maximum is -inf, and -inf - -inf must not be formed.
__device__ __forceinline__ float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

// Continues `state` with a tile of kTileKeys keys, of which a query sees those below its limit.
template <typename T, int kDim>
__device__ __forceinline__ void attend_tile(WarpState<kDim>& state, T* queries, T* keys, T* values,
                                            int first_key, const int (&limit)[2], float scale) {
  constexpr int kKeys = kTileKeys<kDim>;
  const int lane = threadIdx.x % kWarp;
  float scores[kKeys / 8][4];
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    scores[j][0] = scores[j][1] = scores[j][2] = scores[j][3] = 0.0f;
  }
#pragma unroll 2
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t a[4];
    ldmatrix_x4(a, piece_of<T, kDim>(queries, lane % 16, d * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < kKeys / 8; j += 2) {
      uint32_t b[4];
      ldmatrix_x4(b,
                  piece_of<T, kDim>(keys, j * 8 + lane % 8 + lane / 16 * 8, d * 2 + lane / 8 % 2));
      const uint32_t first[2] = {b[0], b[1]};
      const uint32_t second[2] = {b[2], b[3]};
      mma_16x8x16<T>(scores[j], a, first);
      mma_16x8x16<T>(scores[j + 1], a, second);
    }
  }

  float max[2] = {state.max[0], state.max[1]};
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = first_key + j * 8 + lane % 4 * 2 + e % 2;
      scores[j][e] = key < limit[e / 2] ? scores[j][e] * scale : -INFINITY;
      max[e / 2] = fmaxf(max[e / 2], scores[j][e]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    max[half] = fmaxf(max[half], __shfl_xor_sync(kAllLanes, max[half], 1));
    max[half] = fmaxf(max[half], __shfl_xor_sync(kAllLanes, max[half], 2));
    const float shift = shift_of(max[half]);
    const float factor = exp2_approximate(state.max[half] - shift);
    state.max[half] = max[half];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& weight = scores[j][2 * half + e];
        weight = exp2_approximate(weight - shift);
        sum += weight;
      }
    }
    state.sum[half] = __fmaf_rn(state.sum[half], factor, sum);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      state.values[d][2 * half] *= factor;
      state.values[d][2 * half + 1] *= factor;
    }
  }
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    const uint32_t a[4] = {pack_pair<T>(scores[2 * k][0], scores[2 * k][1]),
                           pack_pair<T>(scores[2 * k][2], scores[2 * k][3]),
                           pack_pair<T>(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                           pack_pair<T>(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, piece_of<T, kDim>(values, k * 16 + lane % 16, d * 2 + lane / 16));
      const uint32_t first[2] = {b[0], b[1]};
      const uint32_t second[2] = {b[2], b[3]};
      mma_16x8x16<T>(state.values[2 * d], a, first);
      mma_16x8x16<T>(state.values[2 * d + 1], a, second);
    }
  }
}

// How much of what was summed below `old_max` counts below `max`.
__device__ __forceinline__ float weight_of(float old_max, float max) {
  return exp2_approximate(old_max - shift_of(max));
}

// Adds a tile's maximum and sum; what was there counts `kept` times then, the tile `added` times.
// A tile that the query does not see changes no bit.
__device__ __forceinline__ void add_sums(float& max, float& sum, float tile_max, float tile_sum,
                                         float& kept, float& added) {
  const float new_max = fmaxf(max, tile_max);
  kept = weight_of(max, new_max);
  added = weight_of(tile_max, new_max);
  max = new_max;
  sum = __fmaf_rn(tile_sum, added, sum * kept);
}
__device__ __forceinline__ float add_values(float value, float tile_value, float kept,
                                            float added) {
  return __fmaf_rn(tile_value, added, value * kept);
}

// Adds a tile that was summed by itself.
template <int kDim>
__device__ __forceinline__ void add_tile(WarpState<kDim>& state, const WarpState<kDim>& tile) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float kept;
    float added;
    add_sums(state.max[half], state.sum[half], tile.max[half], tile.sum[half], kept, added);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        state.values[d][e] = add_values(state.values[d][e], tile.values[d][e], kept, added);
      }
    }
  }
}

// Over the four lanes that share a query.
__device__ __forceinline__ float sum_of_columns(float sum) {
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  return sum;
}

}  // namespace
}  // namespace frspec::cuda
