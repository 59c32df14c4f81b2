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

// Slots of a tile.
template <int kDim>
constexpr int kTileKeys = kDim > 128 ? 32 : 64;

constexpr int kTailStep = 32;
constexpr int kMaxTail = kMaxInFlight + kTailStep - 1;

// Rows whose own positions a block sums: as many as its tiles have room for.
template <int kDim, int kStages>
constexpr int kOwnJobs =
    kStages* kTileKeys<kDim> / kMaxTail < kWarps ? kStages* kTileKeys<kDim> / kMaxTail : kWarps;

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
  int kv_heads;
  int group;         // query heads of a key/value head
  int head_blocks;   // of 16 query heads of a group
  int query_blocks;  // of the queries of a key/value head
  int ranges;        // that there may be; part `ranges` is the rows' own positions
  // The ranges end before the slots that this pass appends: in a tree, whose rows see others of the
  // pass among their last kMaxInFlight positions, and where there are no more rows than that.
  bool ranges_are_there;
  int head_dim;  // D
  float scale;   // log2(e) / sqrt(D)
  float* partial_values;
  float2* partial_sums;
};

// What rows see is read before dependency_wait(), out of L2: what another grid left in L1 may be
// older.
__device__ __forceinline__ int visible_positions(const AttentionParams& p, int row) {
  int count = __ldcg(p.prefix_length + row);
#pragma unroll 1
  for (int word = 0; word < p.ancestor_words; ++word) {
    count += __popcll(__ldcg(p.ancestors + static_cast<int64_t>(row) * p.ancestor_words + word));
  }
  return count;
}

// Positions in the ranges of a row that sees `visible` of them; the others are its own.
__device__ __forceinline__ int shared_positions(int visible) {
  return visible < kMaxInFlight ? 0 : (visible - kMaxInFlight) / kTailStep * kTailStep;
}

// The slot of logical position `position` of a row.
__device__ __forceinline__ int slot_of(const AttentionParams& p, int row, int position) {
  const int prefix = __ldcg(p.prefix_length + row);
  if (position < prefix) return position;
  int index = position - prefix;  // of the ancestor, root first
  const uint64_t* words = p.ancestors + static_cast<int64_t>(row) * p.ancestor_words;
#pragma unroll 1
  for (int word = 0; word < p.ancestor_words; ++word) {
    uint64_t bits = __ldcg(words + word);
    const int count = __popcll(bits);
    if (index >= count) {
      index -= count;
      continue;
    }
#pragma unroll 1
    for (; index > 0; --index) bits &= bits - 1;
    return __ldcg(p.tree_base) + word * 64 + __ffsll(static_cast<long long>(bits)) - 1;
  }
  return 0;
}

// Shared memory rows are one 16-byte piece longer than kDim, an odd number of pieces, so that
// ldmatrix meets no bank conflict.
template <int kDim>
constexpr int kPitch = kDim + 8;

template <typename T, int kDim>
__device__ __forceinline__ T* piece_of(T* rows, int row, int piece) {
  return rows + row * kPitch<kDim> + piece * 8;
}

// Starts copying `count` rows in pieces of 16 bytes, a thread the same piece of every
// few rows, and zeroing what is behind head_dim: from(row) is where a row begins, null where zeros
// stand for it. Not unrolled: a kernel that runs through its code once is as fast as its
// instructions come out of memory.
template <typename T, int kDim, typename From>
__device__ __forceinline__ void load_rows(T* shared, int count, int head_dim, const T* somewhere,
                                          const From& from) {
  constexpr int kRowThreads = kDim > 128 ? 32 : kDim > 64 ? 16 : 8;  // a piece each
  const int piece = threadIdx.x % kRowThreads;
  if (piece >= kDim / 8) return;
  const bool inside = piece * 8 < head_dim;
  T* to = piece_of<T, kDim>(shared, threadIdx.x / kRowThreads, piece);
#pragma unroll 1
  for (int row = threadIdx.x / kRowThreads; row < count; row += kThreads / kRowThreads) {
    const T* begin = from(row);
    const bool copies = inside && begin != nullptr;
    copy_async_16(to, copies ? begin + piece * 8 : somewhere, copies ? 16 : 0);
    to += kThreads / kRowThreads * kPitch<kDim>;
  }
}

// The same for rows that follow each other in memory, of which the first `there` are.
template <typename T, int kDim>
__device__ __forceinline__ void load_neighbours(T* shared, int count, int there, int head_dim,
                                                const T* first) {
  constexpr int kRowThreads = kDim > 128 ? 32 : kDim > 64 ? 16 : 8;
  const int piece = threadIdx.x % kRowThreads;
  if (piece >= kDim / 8) return;
  int row = threadIdx.x / kRowThreads;
  T* to = piece_of<T, kDim>(shared, row, piece);
  const T* from = first + row * head_dim + piece * 8;
  if (piece * 8 >= head_dim) there = 0;
#pragma unroll 4
  for (; row < count; row += kThreads / kRowThreads) {
    copy_async_16(to, row < there ? from : first, row < there ? 16 : 0);
    to += kThreads / kRowThreads * kPitch<kDim>;
    from += kThreads / kRowThreads * head_dim;
  }
}

}  // namespace
}  // namespace frspec::cuda
