// What the kernels of attention share: sizes, arguments, and which positions are whose.
#pragma once

#include "device.cuh"
#include "draft_tree.h"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

constexpr int kMaxInFlight = kMaxTreeDepth + 1;  // ancestors of a row, itself included
constexpr int kRangeKeys = 256;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlockQueries = kWarps * 16;  // query heads of all rows of a block
constexpr float kLog2E = 1.4426950408889634f;

// Slots of a tile, and tiles that are under way or in use: what fits in 99 KiB of shared memory.
template <int kDim>
constexpr int kTileKeys = kDim > 128 ? 32 : 64;
template <int kDim>
constexpr int kTileStages = kDim > 64 ? 2 : 4;

constexpr int kTailStep = 32;
constexpr int kMaxTail = kMaxInFlight + kTailStep - 1;

struct AttentionParams {
  const void* q;
  int64_t q_stride;
  void* out;
  int64_t out_stride;
  const void* keys;
  const void* values;
  int64_t head_stride;  // elements between heads of the cache
  const int32_t* prefix_length;
  const int32_t* tree_base;
  const uint64_t* ancestors;
  int ancestor_words;
  int n;
  int query_heads;
  int group;     // query heads of a key/value head
  int head_dim;  // D
  float scale;   // log2(e) / sqrt(D)
  float* partial_values;
  float2* partial_sums;
};

__device__ __forceinline__ int visible_positions(const AttentionParams& p, int row) {
  int count = p.prefix_length[row];
  for (int word = 0; word < p.ancestor_words; ++word) {
    count += __popcll(p.ancestors[static_cast<int64_t>(row) * p.ancestor_words + word]);
  }
  return count;
}

// Positions that attend_kernel sums for a row that sees `visible` of them.
__device__ __forceinline__ int shared_positions(int visible) {
  return visible < kMaxInFlight ? 0 : (visible - kMaxInFlight) / kTailStep * kTailStep;
}

// Shared memory rows are one 16-byte piece longer than kDim, an odd number of pieces, so that
// ldmatrix meets no bank conflict.
template <int kDim>
constexpr int kPitch = kDim + 8;

template <typename T, int kDim>
__device__ __forceinline__ T* piece_of(T* rows, int row, int piece) {
  return rows + row * kPitch<kDim> + piece * 8;
}

// Starts copying `count` rows, zeroing what is outside.
template <typename T, int kDim, typename Row>
__device__ __forceinline__ void load_rows(T* shared, int count, int head_dim, const T* somewhere,
                                          const Row& row_of) {
  constexpr int kPieces = kDim / 8;
  for (int i = threadIdx.x; i < count * kPieces; i += kThreads) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const T* from = piece * 8 < head_dim ? row_of(row) : nullptr;
    copy_async_16(piece_of<T, kDim>(shared, row, piece),
                  from == nullptr ? somewhere : from + piece * 8, from == nullptr ? 0 : 16);
  }
}

template <typename T, int kDim>
constexpr size_t attend_shared_bytes() {
  return carved_bytes(sizeof(T) * kBlockQueries * kPitch<kDim>) +
         2 * carved_bytes(sizeof(T) * kTileStages<kDim> * kTileKeys<kDim> * kPitch<kDim>);
}

template <typename T, int kDim>
constexpr size_t finish_shared_bytes() {
  return 2 * carved_bytes(sizeof(T) * kMaxTail * kPitch<kDim>);
}

}  // namespace
}  // namespace frspec::cuda
