// The k largest log-softmax values of each row of logits, with their token ids:
//
//   logprob[i] = logit[i] - max - log(sum_j exp(logit[j] - max)),  ties: the lower column first
//
// logits: [n, S] fp32. In two steps: a block for each chunk of kChunk columns finds the chunk's
// part of the sum and its k best; a block for each row merges the chunks, first to last. NaN counts
// as -inf; logits of inf have 0, and beside them all others -inf.
#include "block_select.cuh"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 4096;

// Merges two softmax sums, each relative to its own maximum.
__device__ __forceinline__ float2 merge_sums(const float2& a, const float2& b) {
  const float max = fmaxf(a.x, b.x);
  if (max == -INFINITY) return make_float2(-INFINITY, 0.0f);
  return make_float2(max, a.y * __expf(a.x - max) + b.y * __expf(b.x - max));
}

__device__ __forceinline__ float2 warp_merge_sums(float2 part) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float2 other = make_float2(__shfl_xor_sync(kAllLanes, part.x, offset),
                                     __shfl_xor_sync(kAllLanes, part.y, offset));
    part = merge_sums(part, other);
  }
  return part;
}

// The k best of a chunk come from the k best of each warp, which gives away its best entry k times.
__global__ void __launch_bounds__(kThreads)
    scan_chunk_kernel(const float* logits, int64_t stride, int cols, int k, float2* chunk_sums,
                      uint64_t* chunk_entries) {
  constexpr int kOwn = kChunk / kThreads;
  SHARED(float2, warp_sums, [kThreads / kWarp]);
  SHARED(uint64_t, best, [kThreads / kWarp * kMaxTreeTopK]);
  dependency_launch();
  dependency_wait();
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int first = blockIdx.x * kChunk;
  const int count = min(kChunk, cols - first);
  const float* row = logits + blockIdx.y * stride + first;
  float own[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = threadIdx.x + j * kThreads;
    own[j] = i < count ? fmaxf(row[i], -INFINITY) : -INFINITY;  // which is -inf for NaN
  }
  float max = -INFINITY;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) max = fmaxf(max, own[j]);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    if (own[j] > -INFINITY) sum += __expf(own[j] - max);
  }
  const float2 part = warp_merge_sums(make_float2(max, sum));
  if (lane == 0) warp_sums[warp] = part;

  uint32_t keys[kOwn];  // plus one; 0: not there, or given away
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const bool there = static_cast<int>(threadIdx.x) + j * kThreads < count;
    keys[j] = there ? order_key(own[j]) + 1 : 0;
  }
#pragma unroll 1
  for (int place = 0; place < k; ++place) {
    uint32_t key = 0;
    int at = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (keys[j] > key) {
        key = keys[j];
        at = j;
      }
    }
    const uint32_t most = __reduce_max_sync(kAllLanes, key);
    const unsigned column = threadIdx.x + at * kThreads;
    const unsigned lowest = __reduce_min_sync(kAllLanes, key == most ? column : ~0u);
    if (lane == 0) {
      best[warp * k + place] =
          most == 0 ? 0 : keyed_entry(most - 1, first + static_cast<int>(lowest));
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (threadIdx.x + j * kThreads == lowest) keys[j] = 0;
    }
  }
  __syncthreads();
  const int64_t chunk = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) {
    float2 total = warp_sums[0];
#pragma unroll 1
    for (int w = 1; w < kThreads / kWarp; ++w) total = merge_sums(total, warp_sums[w]);
    chunk_sums[chunk] = total;
  }
  uint64_t* entries = chunk_entries + chunk * k;
  for (int i = count + threadIdx.x; i < k; i += kThreads) entries[i] = 0;
  place_largest<kThreads>(best, kThreads / kWarp * k, k,
                          [&](int place, uint64_t entry) { entries[place] = entry; });
}

__global__ void __launch_bounds__(kThreads)
    merge_chunks_kernel(float* logprobs, int32_t* tokens, const float* logits, int64_t stride,
                        const int32_t* column_tokens, int k, int chunks, const float2* chunk_sums,
                        const uint64_t* chunk_entries) {
  SHARED(float, log_sum);
  SHARED(float, row_max);
  dependency_launch();
  dependency_wait();
  const int count = chunks * k;
  const float2* sums = chunk_sums + static_cast<int64_t>(blockIdx.x) * chunks;
  if (threadIdx.x < kWarp) {
    float2 total = make_float2(-INFINITY, 0.0f);
    for (int c = threadIdx.x; c < chunks; c += kWarp) total = merge_sums(total, sums[c]);
    total = warp_merge_sums(total);
    if (threadIdx.x == 0) {
      row_max = total.x;
      log_sum = total.x < INFINITY ? logf(total.y) : 0.0f;  // of inf the sum is NaN
    }
  }
  __syncthreads();
  SmemCarver carver;
  uint64_t* entries = carver.take<uint64_t>(count);
  const uint64_t* from = chunk_entries + static_cast<int64_t>(blockIdx.x) * count;
  for (int i = threadIdx.x; i < count; i += kThreads) entries[i] = from[i];
  __syncthreads();
  const float* row = logits + blockIdx.x * stride;
  place_largest<kThreads>(entries, count, k, [&](int place, uint64_t entry) {
    const int column = entry_index(entry);
    const float logit = row[column];
    const float below_max = logit == row_max ? 0.0f : logit - row_max;
    logprobs[blockIdx.x * k + place] = logit > -INFINITY ? below_max - log_sum : -INFINITY;
    tokens[blockIdx.x * k + place] = column_tokens == nullptr ? column : column_tokens[column];
  });
}

}  // namespace

int64_t topk_chunks(int64_t cols) { return ceil_div(cols, kChunk); }

void topk_logprobs(float* logprobs, int32_t* tokens, const Tensor& logits,
                   const int32_t* column_tokens, int64_t k, const TopkScratch& scratch,
                   cudaStream_t stream) {
  FRSPEC_CHECK(k > 0 && k <= kMaxTreeTopK && k <= logits.cols && logits.dtype == DType::kF32, Error,
               "topk_logprobs: k is ", k, " of ", logits.cols, " ", dtype_name(logits.dtype),
               " columns, expected 1 to ", kMaxTreeTopK, " of fp32");
  if (logits.rows == 0) return;
  const auto chunks = static_cast<unsigned>(topk_chunks(logits.cols));
  const auto rows = static_cast<unsigned>(logits.rows);
  FRSPEC_CHECK(size_t{rows} * chunks <= scratch.sums &&
                   size_t{rows} * chunks * static_cast<size_t>(k) <= scratch.entries,
               Error, "topk_logprobs: ", k, " of [", logits.rows, ", ", logits.cols,
               "] exceed the planned workspace");
  const float* data = static_cast<const float*>(logits.data);
  launch<scan_chunk_kernel>({dim3(chunks, rows), dim3(kThreads), stream}, "topk_logprobs", data,
                            logits.stride, static_cast<int>(logits.cols), static_cast<int>(k),
                            scratch.chunk_sums, scratch.chunk_entries);
  launch<merge_chunks_kernel>(
      {dim3(rows), dim3(kThreads), stream, carved_bytes(sizeof(uint64_t) * chunks * k)},
      "topk_logprobs", logprobs, tokens, data, logits.stride, column_tokens, static_cast<int>(k),
      static_cast<int>(chunks), static_cast<const float2*>(scratch.chunk_sums),
      static_cast<const uint64_t*>(scratch.chunk_entries));
}

}  // namespace frspec::cuda
