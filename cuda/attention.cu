// Attention of n rows over the KV cache, grouped query heads sharing a key/value head:
//
//   out[D] = sum_t p[t] v[t] / sum_t p[t],  p[t] = exp(q . k[t] / sqrt(D) - max)
//
// q, out: [n, H D], keys and values [K, C, D], bf16 or fp16; sums fp32. D is padded with zeros to
// one of the sizes that kernels exist for.
//
// Rows of a prompt: one pass over the visible slots, in tiles of kTileKeys slots, with a running
// maximum.
//
// All other rows (contract 1): what is summed in which order depends on the row's logical positions
// alone. Of the v visible positions, whole steps of kTailStep that end at least kMaxInFlight
// positions before the end are committed in any tree, so they sit in slots of their own numbers:
// they are summed in ranges of kRangeKeys that begin at fixed positions, a tile at a time, and the
// tiles of a range are added in ascending order (with D above 128 each continues the one before).
// The remaining positions, kMaxInFlight to kMaxTail of them, are the row's own: they are gathered
// in logical order (committed tokens, then the row's ancestors, root first) and summed as one more
// part. merge_kernel adds the parts, the own positions last.
//
// How a range is shared among warps is free where its tiles are summed by themselves: 16 queries
// of 64 for each warp, or, where there are few queries and much of the device would be idle, a tile
// for each.
#include <cmath>

#include "attention_merge.cuh"
#include "attention_params.cuh"
#include "attention_tile.cuh"
#include "config.h"
#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

enum class Division {
  kPrompt,   // a block: 64 queries, all they see; a warp: 16 of them
  kQueries,  // a block: 64 queries, a range; a warp: 16 of them
  kKeys,     // a block: 16 queries, a range; a warp: a tile of it
};

// Tiles that are under way or in use. All but kKeys fit in 99 KiB of shared memory.
template <int kDim, Division kDivision>
constexpr int kTileStages = kDivision == Division::kKeys || kDim <= 64 ? 4 : 2;
template <Division kDivision>
constexpr int kQueries = kDivision == Division::kKeys ? 16 : kBlockQueries;
template <int kDim>
constexpr bool kDividesKeys = kTileKeys<kDim>* kWarps == kRangeKeys;

constexpr int kOwnSlots = kWarps * kMaxTail;

template <typename T, int kDim, Division kDivision>
constexpr size_t shared_bytes() {
  const size_t tiles =
      carved_bytes(sizeof(T) * kTileStages<kDim, kDivision> * kTileKeys<kDim> * kPitch<kDim>);
  constexpr bool kSlots = kOwnJobs<kDim, kTileStages<kDim, kDivision>> == kWarps;
  return carved_bytes(sizeof(T) * kBlockQueries * kPitch<kDim>) + 2 * tiles +
         (kSlots ? carved_bytes(sizeof(int) * kOwnSlots) : 0);
}

// Part `part` of a row's head: unnormalised values, maximum and sum.
__device__ __forceinline__ int64_t part_index(const AttentionParams& p, int part, int row,
                                              int head) {
  return (static_cast<int64_t>(part) * p.n + row) * p.query_heads + head;
}

// The 16 queries of a warp, of one part; query_at(i) gives the row and the head of query i, the row
// negative where there is none.
template <int kDim, typename QueryAt>
__device__ __forceinline__ void store_part(const AttentionParams& p, int part,
                                           const WarpState<kDim>& state, const QueryAt& query_at) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_of_columns(state.sum[half]);
    const int2 query = query_at(lane / 4 + 8 * half);
    if (query.x < 0) continue;
    const int64_t at = part_index(p, part, query.x, query.y);
    if (lane % 4 == 0) p.partial_sums[at] = make_float2(state.max[half], sum);
    float* partial = p.partial_values + at * kDim + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      *reinterpret_cast<float2*>(partial + d * 8) =
          make_float2(state.values[d][2 * half], state.values[d][2 * half + 1]);
    }
  }
}

template <typename T, int kDim, typename QueryAt>
__device__ __forceinline__ void store_prompt(const AttentionParams& p, const WarpState<kDim>& state,
                                             const QueryAt& query_at) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = 1.0f / sum_of_columns(state.sum[half]);
    const int2 query = query_at(lane / 4 + 8 * half);
    if (query.x < 0) continue;
    T* out = static_cast<T*>(p.out) + query.x * p.out_stride + query.y * p.head_dim;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      const int at = d * 8 + lane % 4 * 2;
      if (at >= p.head_dim) continue;
      *reinterpret_cast<uint32_t*>(out + at) =
          pack_pair<T>(state.values[d][2 * half] * scale, state.values[d][2 * half + 1] * scale);
    }
  }
}

// Division::kKeys: adds the warps' tiles in ascending order, every warp a part of the columns, and
// stores the sums.
template <int kDim, typename QueryAt>
__device__ __forceinline__ void store_part_of_tiles(const AttentionParams& p, int part, int tiles,
                                                    const WarpState<kDim>& own, float* shared,
                                                    const QueryAt& query_at) {
  constexpr int kColumns = kDim / 8;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const auto place = [&](int item, int of_warp) -> float& {
    return shared[(item * kWarps + of_warp) * kWarp + lane];
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    place(half, warp) = own.max[half];
    place(2 + half, warp) = own.sum[half];
  }
#pragma unroll
  for (int d = 0; d < kColumns; ++d) {
#pragma unroll
    for (int e = 0; e < 4; ++e) place(4 + 4 * d + e, warp) = own.values[d][e];
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float max = -INFINITY;
    float sum = 0.0f;
    float kept[kWarps];
    float added[kWarps];
#pragma unroll
    for (int t = 0; t < kWarps; ++t) {
      if (t < tiles) add_sums(max, sum, place(half, t), place(2 + half, t), kept[t], added[t]);
    }
    sum = sum_of_columns(sum);
    const int2 query = query_at(lane / 4 + 8 * half);
    if (query.x < 0) continue;
    const int64_t at = part_index(p, part, query.x, query.y);
    if (warp == 0 && lane % 4 == 0) p.partial_sums[at] = make_float2(max, sum);
#pragma unroll 1
    for (int d = warp; d < kColumns; d += kWarps) {
      float values[2] = {0.0f, 0.0f};
#pragma unroll
      for (int t = 0; t < kWarps; ++t) {
        if (t >= tiles) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          values[e] = add_values(values[e], place(4 + 4 * d + 2 * half + e, t), kept[t], added[t]);
        }
      }
      *reinterpret_cast<float2*>(p.partial_values + at * kDim + d * 8 + lane % 4 * 2) =
          make_float2(values[0], values[1]);
    }
  }
}

// The rows' own positions. A job is a row with up to 16 query heads of a key/value head, the work
// of one warp; a block has as many as its shared memory holds positions for.
template <typename T, int kDim, int kStages>
__device__ __forceinline__ void attend_own(const AttentionParams& p, int block, int kv_head,
                                           T* queries, T* keys, T* values, int* slots) {
  constexpr int kKeys = kTileKeys<kDim>;
  static_assert(kMaxTail % kKeys == 0);
  constexpr int kJobs = kOwnJobs<kDim, kStages>;
  const int warp = threadIdx.x / kWarp;
  const int first_job = block * kJobs;
  const int jobs = min(p.n * p.head_blocks - first_job, kJobs);
  const auto row_of = [&](int job) { return (first_job + job) / p.head_blocks; };
  const auto head_of = [&](int job, int i) {  // in the group
    return (first_job + job) % p.head_blocks * 16 + i;
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < jobs * kMaxTail; i += kThreads) {
    const int row = row_of(i / kMaxTail);
    const int visible = visible_positions(p, row);
    const int position = shared_positions(visible) + i % kMaxTail;
    slots[i] = position < visible ? slot_of(p, row, position) : -1;
  }
  const int own_row = warp < jobs ? row_of(warp) : 0;
  const int own_visible = visible_positions(p, own_row);
  const int count = own_visible - shared_positions(own_visible);
  dependency_wait();
  __syncthreads();
  const T* q = static_cast<const T*>(p.q);
  load_rows<T, kDim>(queries, jobs * 16, p.head_dim, q, [&](int i) -> const T* {
    const int head = head_of(i / 16, i % 16);
    if (head >= p.group) return nullptr;
    return q + row_of(i / 16) * p.q_stride + (kv_head * p.group + head) * p.head_dim;
  });
  const auto load = [&](T* shared, const void* cache) {
    const T* from = static_cast<const T*>(cache) + kv_head * p.head_stride;
    load_rows<T, kDim>(shared, jobs * kMaxTail, p.head_dim, from, [&](int i) -> const T* {
      return slots[i] < 0 ? nullptr : from + static_cast<int64_t>(slots[i]) * p.head_dim;
    });
  };
  load(keys, p.keys);
  load(values, p.values);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  if (warp >= jobs) return;
  WarpState<kDim> state;
  state.clear();
#pragma unroll 1
  for (int first = 0; first < count; first += kKeys) {
    const int at = (warp * kMaxTail + first) * kPitch<kDim>;
    attend_tile<T, kDim>(state, queries + warp * 16 * kPitch<kDim>, keys + at, values + at, first,
                         {count, count}, p.scale);
  }
  store_part<kDim>(p, p.ranges, state, [&](int i) {
    const int head = head_of(warp, i);
    return make_int2(head < p.group ? own_row : -1, kv_head * p.group + head);
  });
}

// Blocks that registers have to leave room for on a multiprocessor, which is what shared memory
// allows at 64 and 128; left to itself, the compiler may spill for one more.
constexpr int kAttendBlocks = 2;

// What rows see, and with it the slots, was written before the product in front of RoPE, which lets
// RoPE start only when it has waited for that; so were the keys and values of the ranges, where
// ranges_are_there. They are read while RoPE still runs.
//
// grid: (ranges times blocks of queries, then blocks of attend_own) times K, key/value heads
// innermost. Blocks start in this order, those that take the longest first: all heads' ranges come
// before any own positions, and of a prompt the last rows, which see the most. Query i of a
// key/value head is head i % group of row i / group.
template <typename T, int kDim, Division kDivision>
__global__ void __launch_bounds__(kThreads, kAttendBlocks) attend_kernel(const AttentionParams p) {
  constexpr bool kPrompt = kDivision == Division::kPrompt;
  constexpr int kKeys = kTileKeys<kDim>;
  constexpr int kStages = kTileStages<kDim, kDivision>;
  SmemCarver carver;
  T* queries = carver.take<T>(kBlockQueries * kPitch<kDim>);
  T* keys = carver.take<T>(kStages * kKeys * kPitch<kDim>);
  T* values = carver.take<T>(kStages * kKeys * kPitch<kDim>);
  dependency_launch();
  const int kv_head = static_cast<int>(blockIdx.x) % p.kv_heads;
  const int block = static_cast<int>(blockIdx.x) / p.kv_heads;
  if constexpr (!kPrompt) {
    const int range_blocks = p.ranges * p.query_blocks;
    if (block >= range_blocks) {
      // Fewer jobs than warps leave half of the queries' place.
      int* slots = kOwnJobs<kDim, kStages> == kWarps
                       ? carver.take<int>(kOwnSlots)
                       : reinterpret_cast<int*>(queries + kBlockQueries / 2 * kPitch<kDim>);
      attend_own<T, kDim, kStages>(p, block - range_blocks, kv_head, queries, keys, values, slots);
      return;
    }
  }

  const int query_count = p.n * p.group;
  const int range = block / p.query_blocks;
  const int query_block = kPrompt ? p.query_blocks - 1 - block : block % p.query_blocks;
  const int first_query = query_block * kQueries<kDivision>;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int warp_query = first_query + (kDivision == Division::kKeys ? 0 : warp * 16);
  // How far each of this lane's two queries sees, and the furthest of the block.
  int limit[2];
  int furthest = 0;
  const int last_row = (min(first_query + kQueries<kDivision>, query_count) - 1) / p.group;
#pragma unroll 1
  for (int row = first_query / p.group + lane; row <= last_row; row += kWarp) {
    const int visible = visible_positions(p, row);
    furthest = max(furthest, kPrompt ? visible : shared_positions(visible));
  }
  furthest = __reduce_max_sync(kAllLanes, furthest);
  const int range_begin = kPrompt ? 0 : range * kRangeKeys;
  const int range_end = kPrompt ? furthest : min(furthest, range_begin + kRangeKeys);
  if (range_begin >= range_end) {  // the whole block
    dependency_wait();
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = warp_query + lane / 4 + 8 * half;
    const int visible = query < query_count ? visible_positions(p, query / p.group) : 0;
    limit[half] = min(kPrompt ? visible : shared_positions(visible), range_end);
  }
  if (kPrompt || !p.ranges_are_there) dependency_wait();
  const T* cache_keys = static_cast<const T*>(p.keys) + kv_head * p.head_stride;
  const T* cache_values = static_cast<const T*>(p.values) + kv_head * p.head_stride;
  const auto load_tile = [&](int first, int stage) {
    if (first < range_end) {
      // Slots behind the end may hold anything, also NaN: zeros stand for them.
      const int there = range_end - first;
      const int64_t at = static_cast<int64_t>(first) * p.head_dim;
      load_neighbours<T, kDim>(keys + stage * kKeys * kPitch<kDim>, kKeys, there, p.head_dim,
                               cache_keys + at);
      load_neighbours<T, kDim>(values + stage * kKeys * kPitch<kDim>, kKeys, there, p.head_dim,
                               cache_values + at);
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) load_tile(range_begin + s * kKeys, s);
  if (!kPrompt && p.ranges_are_there) dependency_wait();
  const T* q = static_cast<const T*>(p.q);
  load_rows<T, kDim>(queries, kQueries<kDivision>, p.head_dim, q, [&](int i) -> const T* {
    const int query = first_query + i;
    if (query >= query_count) return nullptr;
    return q + query / p.group * p.q_stride + (kv_head * p.group + query % p.group) * p.head_dim;
  });
  copy_async_commit();
  const auto attend = [&](WarpState<kDim>& tile, int first, int stage) {
    attend_tile<T, kDim>(tile, queries + (warp_query - first_query) * kPitch<kDim>,
                         keys + stage * kKeys * kPitch<kDim>, values + stage * kKeys * kPitch<kDim>,
                         first, limit, p.scale);
  };
  const auto query_at = [&](int i) {
    const int query = warp_query + i;
    return make_int2(query < query_count ? query / p.group : -1,
                     kv_head * p.group + query % p.group);
  };

  WarpState<kDim> state;
  state.clear();
  if constexpr (kDivision == Division::kKeys) {
    copy_async_wait<0>();
    __syncthreads();
    const int first = range_begin + warp * kKeys;
    if (first < range_end) attend(state, first, warp);
    __syncthreads();  // keys and values make room for sums
    static_assert((kDim / 2 + 4) * kThreads * sizeof(float) <=
                  kStages * kKeys * kPitch<kDim> * sizeof(T));
    store_part_of_tiles<kDim>(p, range, (range_end - range_begin + kKeys - 1) / kKeys, state,
                              reinterpret_cast<float*>(keys), query_at);
  } else {
    const bool active = warp_query < query_count;  // the same for the whole warp
    int stage = 0;
#pragma unroll 1
    for (int first = range_begin; first < range_end; first += kKeys) {
      if (first == range_begin) {
        copy_async_wait<0>();  // the queries came last
      } else {
        copy_async_wait<kStages - 1>();
      }
      __syncthreads();
      if (active) {
        if constexpr (kPrompt || !kDividesKeys<kDim>) {
          attend(state, first, stage);
        } else {
          WarpState<kDim> tile;
          tile.clear();
          attend(tile, first, stage);
          add_tile(state, tile);
        }
      }
      __syncthreads();
      load_tile(first + kStages * kKeys, stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if (!active) return;
    if constexpr (kPrompt) {
      store_prompt<T, kDim>(p, state, query_at);
    } else {
      store_part<kDim>(p, range, state, query_at);
    }
  }
}

template <typename T, int kDim, Division kDivision>
void launch_attend(AttentionParams p, cudaStream_t stream) {
  constexpr size_t kBytes = shared_bytes<T, kDim, kDivision>();
  static_assert(kDivision == Division::kKeys || kBytes <= size_t{99} << 10);
  p.query_blocks = static_cast<int>(ceil_div(int64_t{p.n} * p.group, kQueries<kDivision>));
  unsigned blocks = static_cast<unsigned>(p.query_blocks);
  if constexpr (kDivision != Division::kPrompt) {
    constexpr int kJobs = kOwnJobs<kDim, kTileStages<kDim, kDivision>>;
    blocks =
        blocks * static_cast<unsigned>(p.ranges) + ceil_div(int64_t{p.n} * p.head_blocks, kJobs);
  }
  blocks *= static_cast<unsigned>(p.kv_heads);
  launch<attend_kernel<T, kDim, kDivision>>({dim3(blocks), dim3(kThreads), stream, kBytes},
                                            "attention", p);
}

template <typename T, int kDim>
void launch_attention(const AttentionParams& p, bool prompt, const AttentionDevice& device,
                      cudaStream_t stream) {
  if (prompt) return launch_attend<T, kDim, Division::kPrompt>(p, stream);
  bool divides_keys = false;
  if constexpr (kDividesKeys<kDim>) {
    const int64_t blocks =
        ceil_div(int64_t{p.n} * p.group, kQueries<Division::kKeys>) * p.ranges * p.kv_heads;
    divides_keys = blocks <= 2 * int64_t{device.multiprocessors} &&
                   shared_bytes<T, kDim, Division::kKeys>() <= device.shared_bytes;
    if (divides_keys) launch_attend<T, kDim, Division::kKeys>(p, stream);
  }
  if (!divides_keys) launch_attend<T, kDim, Division::kQueries>(p, stream);
  launch<merge_kernel<T, kDim>>(
      {dim3(ceil_div(int64_t{p.n} * p.query_heads, kWarps)), dim3(kThreads), stream}, "attention",
      p);
}

template <typename T>
void launch_dim(const AttentionParams& p, bool prompt, const AttentionDevice& device,
                cudaStream_t stream) {
  switch (padded_head_dim(p.head_dim)) {
    case 64:
      return launch_attention<T, 64>(p, prompt, device, stream);
    case 80:
      return launch_attention<T, 80>(p, prompt, device, stream);
    case 96:
      return launch_attention<T, 96>(p, prompt, device, stream);
    case 128:
      return launch_attention<T, 128>(p, prompt, device, stream);
    default:
      return launch_attention<T, 256>(p, prompt, device, stream);
  }
}

}  // namespace

int64_t padded_head_dim(int64_t head_dim) {
  for (const int64_t size : {64, 80, 96, 128}) {
    if (head_dim <= size) return size;
  }
  return kMaxHeadDim;
}

namespace {
// Ranges of a row of that many visible positions; the last positions are its own.
int64_t range_count(int64_t max_length) {
  return max_length < kMaxInFlight ? 0 : (max_length - kMaxInFlight + kRangeKeys) / kRangeKeys;
}
}  // namespace

int64_t attention_parts(int64_t max_length) { return range_count(max_length) + 1; }

void attention(const Tensor& out, const Tensor& q, const KvLayer& kv, const Visible& visible,
               bool prompt, const AttentionScratch& scratch, const AttentionDevice& device,
               cudaStream_t stream) {
  const int64_t head_dim = kv.head_dim;
  const int64_t query_heads = head_dim > 0 ? q.cols / head_dim : 0;
  FRSPEC_CHECK(query_heads > 0 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim && kv.heads > 0 &&
                   query_heads * head_dim == q.cols && query_heads % kv.heads == 0 &&
                   out.cols == q.cols && kv.dtype == q.dtype && out.dtype == q.dtype,
               Error, "attention: q [", q.rows, ", ", q.cols, "] ", dtype_name(q.dtype),
               " does not fit ", kv.heads, " key/value heads of ", head_dim, " ",
               dtype_name(kv.dtype));
  FRSPEC_CHECK(!prompt || visible.ancestor_words == 0, Error,
               "attention: rows of a prompt have no ancestors");
  check_rows("attention", q);
  if (q.rows == 0) return;
  const int64_t parts = prompt ? 0 : attention_parts(visible.max_length);
  FRSPEC_CHECK(static_cast<size_t>(parts * q.rows * query_heads) <= scratch.rows, Error,
               "attention: ", parts, " parts of ", q.rows, " rows exceed the planned workspace");
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
  p.kv_heads = static_cast<int>(kv.heads);
  p.group = static_cast<int>(query_heads / kv.heads);
  p.head_blocks = static_cast<int>(ceil_div(p.group, 16));
  p.ranges = static_cast<int>(range_count(visible.max_length));
  p.ranges_are_there = visible.ancestor_words > 0 || q.rows <= kMaxInFlight;
  p.head_dim = static_cast<int>(head_dim);
  p.scale = kLog2E / std::sqrt(static_cast<float>(head_dim));
  p.partial_values = scratch.partial_values;
  p.partial_sums = scratch.partial_sums;
  with_element(q.dtype, "attention",
               [&](auto element) { launch_dim<decltype(element)>(p, prompt, device, stream); });
}

}  // namespace frspec::cuda
