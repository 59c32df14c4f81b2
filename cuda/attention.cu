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
#include <cmath>

#include "attention_finish.cuh"
#include "attention_params.cuh"
#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

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

// Blocks that registers have to leave room for on a multiprocessor, which is what shared memory
// allows at 64 and 128; left to itself, the compiler may spill for one more.
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
