// Attention of n rows over the KV cache, grouped query heads sharing a key/value head:
//
//   out[D] = sum_t p[t] v[t] / sum_t p[t],  p[t] = exp(q . k[t] / sqrt(D) - max)
//
// q, out: [n, H D], keys and values [K, C, D], bf16 or fp16; sums fp32. D is padded with zeros to
// one of the sizes that kernels exist for.
//
// Rows of a prompt (attend_kernel with kPrompt): one pass over the visible slots, in tiles of
// kTileKeys slots, with a running maximum.
//
// All other rows (contract 1): what is summed in which order depends on the row's logical positions
// alone. Of the v visible positions, whole steps of kTailStep that end at least kMaxInFlight
// positions before the end are committed in any tree, so they sit in slots of their own numbers:
// attend_kernel runs them through the tensor cores for all rows at once, in ranges of kRangeKeys
// that begin at fixed positions, one block for each range. The remaining positions, kMaxInFlight to
// kMaxTail of them, are the row's own: finish_kernel sums them in logical order (committed tokens,
// then the row's ancestors, root first), and merges the ranges, first to last, before them.
#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
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

// Softmax state of the 16 queries of a warp, in the layout of an mma accumulator: a lane has
// elements of queries lane / 4 and lane / 4 + 8.
template <int kDim>
struct WarpState {
  float values[kDim / 8][4];
  float max[2];
  float sum[2];  // of this lane's columns
};

template <typename T, int kDim>
__device__ __forceinline__ void attend_tile(WarpState<kDim>& state, T* queries, T* keys, T* values,
                                            int first_key, const int (&limit)[2], float scale) {
  constexpr int kKeys = kTileKeys<kDim>;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  float scores[kKeys / 8][4];
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    scores[j][0] = scores[j][1] = scores[j][2] = scores[j][3] = 0.0f;
  }
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t a[4];
    ldmatrix_x4(a, piece_of<T, kDim>(queries, warp * 16 + lane % 16, d * 2 + lane / 16));
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
    // While nothing is visible the maximum is -inf, and -inf - -inf must not be formed.
    const float shift = max[half] == -INFINITY ? 0.0f : max[half];
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

// Blocks that registers have to leave room for on a multiprocessor. Shared memory allows no more;
// left to itself, the compiler may spill for one more.
constexpr int kAttendBlocks = 2;

// grid: (ranges or 1, K, blocks of kBlockQueries queries). Query i of a key/value head is head
// i % group of row i / group.
template <typename T, int kDim, bool kPrompt>
__global__ void __launch_bounds__(kThreads, kAttendBlocks) attend_kernel(const AttentionParams p) {
  constexpr int kKeys = kTileKeys<kDim>;
  constexpr int kStages = kTileStages<kDim>;
  SmemCarver carver;
  T* queries = carver.take<T>(kBlockQueries * kPitch<kDim>);
  T* keys = carver.take<T>(kStages * kKeys * kPitch<kDim>);
  T* values = carver.take<T>(kStages * kKeys * kPitch<kDim>);
  dependency_launch();
  dependency_wait();

  const int kv_head = blockIdx.y;
  const int query_count = p.n * p.group;
  const int first_query = blockIdx.z * kBlockQueries;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  // How far each of this lane's two queries sees, and the furthest of the block.
  int limit[2];
  int furthest = 0;
  const int last_row = (min(first_query + kBlockQueries, query_count) - 1) / p.group;
  for (int row = first_query / p.group + lane; row <= last_row; row += kWarp) {
    const int visible = visible_positions(p, row);
    furthest = max(furthest, kPrompt ? visible : shared_positions(visible));
  }
  furthest = __reduce_max_sync(kAllLanes, furthest);
  const int range_begin = kPrompt ? 0 : static_cast<int>(blockIdx.x) * kRangeKeys;
  const int range_end = kPrompt ? furthest : min(furthest, range_begin + kRangeKeys);
  if (range_begin >= range_end) return;  // the whole block
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first_query + warp * 16 + lane / 4 + 8 * half;
    const int visible = query < query_count ? visible_positions(p, query / p.group) : 0;
    limit[half] = min(kPrompt ? visible : shared_positions(visible), range_end);
  }
  const bool active = first_query + warp * 16 < query_count;  // the same for the whole warp

  const T* q = static_cast<const T*>(p.q);
  load_rows<T, kDim>(queries, kBlockQueries, p.head_dim, q, [&](int i) -> const T* {
    const int query = first_query + i;
    if (query >= query_count) return nullptr;
    return q + query / p.group * p.q_stride + (kv_head * p.group + query % p.group) * p.head_dim;
  });
  const T* cache_keys = static_cast<const T*>(p.keys) + kv_head * p.head_stride;
  const T* cache_values = static_cast<const T*>(p.values) + kv_head * p.head_stride;
  const auto load_tile = [&](int first, int stage) {
    if (first < range_end) {
      const auto rows_of = [&](const T* cache) {
        return [=](int i) -> const T* {
          // Slots behind the end may hold anything, also NaN: zeros stand for them.
          return first + i < range_end ? cache + static_cast<int64_t>(first + i) * p.head_dim
                                       : nullptr;
        };
      };
      load_rows<T, kDim>(keys + stage * kKeys * kPitch<kDim>, kKeys, p.head_dim, cache_keys,
                         rows_of(cache_keys));
      load_rows<T, kDim>(values + stage * kKeys * kPitch<kDim>, kKeys, p.head_dim, cache_values,
                         rows_of(cache_values));
    }
    copy_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages; ++s) load_tile(range_begin + s * kKeys, s);

  WarpState<kDim> state;
#pragma unroll
  for (int d = 0; d < kDim / 8; ++d) {
    state.values[d][0] = state.values[d][1] = state.values[d][2] = state.values[d][3] = 0.0f;
  }
  state.max[0] = state.max[1] = -INFINITY;
  state.sum[0] = state.sum[1] = 0.0f;
  int stage = 0;
  for (int first = range_begin; first < range_end; first += kKeys) {
    copy_async_wait<kStages - 1>();
    __syncthreads();
    if (active) {
      attend_tile<T, kDim>(state, queries, keys + stage * kKeys * kPitch<kDim>,
                           values + stage * kKeys * kPitch<kDim>, first, limit, p.scale);
    }
    __syncthreads();
    load_tile(first + kStages * kKeys, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  if (!active) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = state.sum[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const int query = first_query + warp * 16 + lane / 4 + 8 * half;
    if (query >= query_count) continue;
    const int row = query / p.group;
    const int head = kv_head * p.group + query % p.group;
    if (kPrompt) {
      T* out = static_cast<T*>(p.out) + row * p.out_stride + head * p.head_dim;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        const int at = d * 8 + lane % 4 * 2;
        if (at >= p.head_dim) continue;
        *reinterpret_cast<uint32_t*>(out + at) =
            pack_pair<T>(state.values[d][2 * half] / sum, state.values[d][2 * half + 1] / sum);
      }
    } else {
      const int64_t at = (static_cast<int64_t>(blockIdx.x) * p.n + row) * p.query_heads + head;
      if (lane % 4 == 0) p.partial_sums[at] = make_float2(state.max[half], sum);
      float* partial = p.partial_values + at * kDim + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        *reinterpret_cast<float2*>(partial + d * 8) =
            make_float2(state.values[d][2 * half], state.values[d][2 * half + 1]);
      }
    }
  }
}

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

template <typename T, int kDim>
void launch_attention(const AttentionParams& p, int64_t kv_heads, int64_t ranges, bool prompt,
                      cudaStream_t stream) {
  const unsigned query_blocks = ceil_div(int64_t{p.n} * p.group, kBlockQueries);
  LaunchConfig config{dim3(1, static_cast<unsigned>(kv_heads), query_blocks), dim3(kThreads),
                      stream, attend_shared_bytes<T, kDim>()};
  if (prompt) {
    launch<attend_kernel<T, kDim, true>>(config, "attention", p);
    return;
  }
  if (ranges > 0) {
    config.grid.x = static_cast<unsigned>(ranges);
    launch<attend_kernel<T, kDim, false>>(config, "attention", p);
  }
  launch<finish_kernel<T, kDim>>({dim3(static_cast<unsigned>(p.n), static_cast<unsigned>(kv_heads)),
                                  dim3(kThreads), stream, finish_shared_bytes<T, kDim>()},
                                 "attention", p);
}

template <typename T>
void launch_dim(const AttentionParams& p, int64_t kv_heads, int64_t ranges, bool prompt,
                cudaStream_t stream) {
  switch (padded_head_dim(p.head_dim)) {
    case 64:
      return launch_attention<T, 64>(p, kv_heads, ranges, prompt, stream);
    case 80:
      return launch_attention<T, 80>(p, kv_heads, ranges, prompt, stream);
    case 96:
      return launch_attention<T, 96>(p, kv_heads, ranges, prompt, stream);
    case 128:
      return launch_attention<T, 128>(p, kv_heads, ranges, prompt, stream);
    default:
      return launch_attention<T, 256>(p, kv_heads, ranges, prompt, stream);
  }
}

}  // namespace

int64_t padded_head_dim(int64_t head_dim) {
  for (const int64_t size : {64, 80, 96, 128}) {
    if (head_dim <= size) return size;
  }
  return 256;
}

int64_t attention_ranges(int64_t max_length) {
  // The last positions are finish_kernel's.
  return max_length < kMaxInFlight ? 0 : (max_length - kMaxInFlight + kRangeKeys) / kRangeKeys;
}

void attention(const Tensor& out, const Tensor& q, const KvLayer& kv, const Visible& visible,
               bool prompt, const AttentionScratch& scratch, cudaStream_t stream) {
  const int64_t head_dim = kv.head_dim;
  const int64_t query_heads = q.cols / head_dim;
  FRSPEC_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim <= 256 && kv.heads > 0 &&
                   query_heads * head_dim == q.cols && query_heads % kv.heads == 0 &&
                   out.cols == q.cols && kv.dtype == q.dtype && out.dtype == q.dtype,
               Error, "attention: q [", q.rows, ", ", q.cols, "] ", dtype_name(q.dtype),
               " does not fit ", kv.heads, " key/value heads of ", head_dim, " ",
               dtype_name(kv.dtype));
  check_rows("attention", q);
  if (q.rows == 0) return;
  const int64_t ranges = prompt ? 0 : attention_ranges(visible.max_length);
  FRSPEC_CHECK(static_cast<size_t>(ranges * q.rows * query_heads) <= scratch.rows, Error,
               "attention: ", ranges, " ranges of ", q.rows, " rows exceed the planned workspace");
  AttentionParams p{};
  p.q = q.data;
  p.q_stride = q.stride;
  p.out = out.data;
  p.out_stride = out.stride;
  p.keys = kv.keys;
  p.values = kv.values;
  p.head_stride = kv.slots * head_dim;
  p.prefix_length = visible.prefix_length;
  p.tree_base = visible.tree_base;
  p.ancestors = visible.ancestors;
  p.ancestor_words = static_cast<int>(visible.ancestor_words);
  p.n = static_cast<int>(q.rows);
  p.query_heads = static_cast<int>(query_heads);
  p.group = static_cast<int>(query_heads / kv.heads);
  p.head_dim = static_cast<int>(head_dim);
  p.scale = kLog2E / std::sqrt(static_cast<float>(head_dim));
  p.partial_values = scratch.partial_values;
  p.partial_sums = scratch.partial_sums;
  with_element(q.dtype, "attention", [&](auto element) {
    launch_dim<decltype(element)>(p, kv.heads, ranges, prompt, stream);
  });
}

}  // namespace frspec::cuda
