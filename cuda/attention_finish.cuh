// The second half of attention.cu: a row's own last positions, in logical order, behind what
// attend_kernel has summed.
#pragma once

#include <cmath>

#include "attention_params.cuh"

namespace frspec::cuda {
namespace {

// The slot of logical position `position` of a row.
__device__ __forceinline__ int slot_of(const AttentionParams& p, int row, int position) {
  const int prefix = p.prefix_length[row];
  if (position < prefix) return position;
  int index = position - prefix;  // of the ancestor, root first
  const uint64_t* words = p.ancestors + static_cast<int64_t>(row) * p.ancestor_words;
  for (int word = 0; word < p.ancestor_words; ++word) {
    uint64_t bits = words[word];
    const int count = __popcll(bits);
    if (index >= count) {
      index -= count;
      continue;
    }
    for (; index > 0; --index) bits &= bits - 1;
    return *p.tree_base + word * 64 + __ffsll(static_cast<long long>(bits)) - 1;
  }
  return 0;
}

// One warp: a query head over `count` own positions of its row, whose keys and values are in shared
// memory, behind `shared` positions that attend_kernel has summed.
template <typename T, int kDim>
__device__ __forceinline__ void finish_head(const AttentionParams& p, int row, int head, int shared,
                                            int count, T* keys, const T* values, float* weights) {
  constexpr int kLanePairs = (kDim + 63) / 64;     // pairs of elements that a lane sums
  constexpr int kLanePieces = (kDim / 8 + 7) / 8;  // 16-byte pieces of a key that a lane multiplies
  const int lane = threadIdx.x % kWarp;
  const T* q = static_cast<const T*>(p.q) + row * p.q_stride + head * p.head_dim;

  // Scores: 8 lanes share a key, each multiplies every eighth piece of it.
  float query[kLanePieces][8];
#pragma unroll
  for (int c = 0; c < kLanePieces; ++c) {
    const int piece = lane % 8 + 8 * c;
    const bool inside = piece * 8 < p.head_dim;
    const uint4 packed =
        inside ? *reinterpret_cast<const uint4*>(q + piece * 8) : make_uint4(0, 0, 0, 0);
    unpack_eight<T>(packed, query[c]);
  }
  float max = -INFINITY;
#pragma unroll 4
  for (int first = 0; first < count; first += 4) {
    const int i = first + lane / 8;
    float score = 0.0f;
    if (i < count) {
#pragma unroll
      for (int c = 0; c < kLanePieces; ++c) {
        const int piece = lane % 8 + 8 * c;
        if (piece * 8 >= kDim) continue;
        float elements[8];
        unpack_eight<T>(*reinterpret_cast<const uint4*>(piece_of<T, kDim>(keys, i, piece)),
                        elements);
#pragma unroll
        for (int j = 0; j < 8; ++j) score = __fmaf_rn(query[c][j], elements[j], score);
      }
    }
    score += __shfl_xor_sync(kAllLanes, score, 1);
    score += __shfl_xor_sync(kAllLanes, score, 2);
    score += __shfl_xor_sync(kAllLanes, score, 4);
    score *= p.scale;
    if (i < count) {
      if (lane % 8 == 0) weights[i] = score;
      max = fmaxf(max, score);
    }
  }
  const int ranges = (shared + kRangeKeys - 1) / kRangeKeys;
  const int64_t partial_step = static_cast<int64_t>(p.n) * p.query_heads;
  const float2* range_sums = p.partial_sums + static_cast<int64_t>(row) * p.query_heads + head;
  for (int r = lane; r < ranges; r += kWarp) max = fmaxf(max, range_sums[r * partial_step].x);
  max = warp_max(max);
  __syncwarp();
  float tail_sum = 0.0f;
  for (int i = lane; i < count; i += kWarp) {
    weights[i] = exp2_approximate(weights[i] - max);
    tail_sum += weights[i];
  }
  tail_sum = warp_sum(tail_sum);
  __syncwarp();

  // The ranges first to last, then the row's own positions in order.
  float sum = 0.0f;
  float2 out[kLanePairs];
#pragma unroll
  for (int c = 0; c < kLanePairs; ++c) out[c] = make_float2(0.0f, 0.0f);
  const float* partial =
      p.partial_values + (static_cast<int64_t>(row) * p.query_heads + head) * kDim;
#pragma unroll 4
  for (int r = 0; r < ranges; ++r) {
    const float2 range = range_sums[r * partial_step];
    const float factor = exp2_approximate(range.x - max);
    sum = __fmaf_rn(range.y, factor, sum);
#pragma unroll
    for (int c = 0; c < kLanePairs; ++c) {
      const int d = lane * 2 + 64 * c;
      if (d >= kDim) continue;
      const float2 value = *reinterpret_cast<const float2*>(partial + r * partial_step * kDim + d);
      out[c].x = __fmaf_rn(value.x, factor, out[c].x);
      out[c].y = __fmaf_rn(value.y, factor, out[c].y);
    }
  }
  sum += tail_sum;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float weight = weights[i];
#pragma unroll
    for (int c = 0; c < kLanePairs; ++c) {
      const int d = lane * 2 + 64 * c;
      if (d >= kDim) continue;
      const float2 pair =
          unpack_pair<T>(*reinterpret_cast<const uint32_t*>(values + i * kPitch<kDim> + d));
      out[c].x = __fmaf_rn(weight, pair.x, out[c].x);
      out[c].y = __fmaf_rn(weight, pair.y, out[c].y);
    }
  }
  T* to = static_cast<T*>(p.out) + row * p.out_stride + head * p.head_dim;
#pragma unroll
  for (int c = 0; c < kLanePairs; ++c) {
    const int d = lane * 2 + 64 * c;
    if (d >= p.head_dim) continue;
    *reinterpret_cast<uint32_t*>(to + d) = pack_pair<T>(out[c].x / sum, out[c].y / sum);
  }
  __syncwarp();  // the weights may be overwritten
}

// grid: (n, K). The block fetches the keys and values of a row's own positions at once; then each
// warp takes every kWarps-th query head of the group.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 4) finish_kernel(const AttentionParams p) {
  SmemCarver carver;
  T* keys = carver.take<T>(kMaxTail * kPitch<kDim>);
  T* values = carver.take<T>(kMaxTail * kPitch<kDim>);
  SHARED(float, all_weights, [kWarps][kMaxTail]);
  SHARED(int, slots, [kMaxTail]);
  dependency_launch();
  dependency_wait();
  const int row = blockIdx.x;
  const int kv_head = blockIdx.y;
  const int visible = visible_positions(p, row);
  const int shared = shared_positions(visible);
  const int count = visible - shared;
  for (int i = threadIdx.x; i < count; i += kThreads) slots[i] = slot_of(p, row, shared + i);
  __syncthreads();
  const T* cache_keys = static_cast<const T*>(p.keys) + kv_head * p.head_stride;
  const T* cache_values = static_cast<const T*>(p.values) + kv_head * p.head_stride;
  const auto offset = [&](int i) { return static_cast<int64_t>(slots[i]) * p.head_dim; };
  load_rows<T, kDim>(keys, count, p.head_dim, cache_keys,
                     [&](int i) { return cache_keys + offset(i); });
  load_rows<T, kDim>(values, count, p.head_dim, cache_values,
                     [&](int i) { return cache_values + offset(i); });
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const int warp = threadIdx.x / kWarp;
  for (int h = warp; h < p.group; h += kWarps) {
    finish_head<T, kDim>(p, row, kv_head * p.group + h, shared, count, keys, values,
                         all_weights[warp]);
  }
}

}  // namespace
}  // namespace frspec::cuda
