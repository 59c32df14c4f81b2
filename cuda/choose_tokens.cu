// The token that the target writes after each row of logits (runtime/sampling.h, contract 2): the
// arg max at temperature 0, above it the arg max of logit / T + Gumbel noise over what top-k, top-p
// and min-p leave; ties: the lower token. NaN is never chosen unless there is nothing else (token
// 0).
//
// logits: [n, V] fp32. A block for each chunk of kChunk tokens finds the chunk's likeliest token
// and, without filters, its noisiest; a block for each row merges the chunks. With filters that
// block then goes over the row: what they leave is a prefix of the tokens sorted by (logit, lower
// token first), so the last token that is kept is found digit by digit, from counts for top-k and
// from probability mass for top-p. Mass is counted in integers (2^40 for the likeliest token),
// whose sums do not depend on the order of threads.
#include "block_select.cuh"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowThreads = 512;
constexpr int kChunk = 4096;
constexpr double kUnitMass = 1099511627776.0;  // 2^40

using Mass = unsigned long long;

__device__ __forceinline__ uint64_t warp_largest(uint64_t value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The largest value of the block, in all threads; ends with a barrier.
template <int kBlock>
__device__ __forceinline__ uint64_t block_largest(uint64_t (&scratch)[kBlock / kWarp],
                                                  uint64_t value) {
  value = warp_largest(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  uint64_t largest = scratch[0];
  for (int w = 1; w < kBlock / kWarp; ++w) {
    largest = scratch[w] > largest ? scratch[w] : largest;
  }
  __syncthreads();
  return largest;
}

// noise: the block of token / 4.
__device__ __forceinline__ float noisy_score(const Sampling& sampling, float logit, int token,
                                             const RandomBlock& noise) {
  return logit / sampling.temperature + gumbel_noise(noise.words[token % 4]);
}
__device__ __forceinline__ float noisy_score(const Sampling& sampling, float logit, int token,
                                             int32_t position) {
  return noisy_score(sampling, logit, token,
                     token_noise_bits(sampling.seed, position, static_cast<uint32_t>(token) / 4));
}

// chunk_best [n, 2, chunks]: the likeliest token of each chunk, then the noisiest.
__global__ void __launch_bounds__(kThreads)
    scan_chunk_kernel(const float* logits, int64_t stride, int vocab, const Sampling* of_request,
                      const int32_t* positions, uint64_t* chunk_best) {
  SHARED(uint64_t, scratch, [kThreads / kWarp]);
  dependency_launch();
  dependency_wait();
  const Sampling sampling = *of_request;
  const bool noisy = sampling.temperature > 0.0f && !filters(sampling, vocab);
  const int first = blockIdx.x * kChunk;
  const int end = min(first + kChunk, vocab);
  const float* row = logits + blockIdx.y * stride;
  const int32_t position = positions[blockIdx.y];
  uint64_t likeliest = 0;
  uint64_t noisiest = 0;
  // Four tokens share a block of random bits.
  for (int base = first + threadIdx.x * 4; base < end; base += kThreads * 4) {
    RandomBlock noise{};
    if (noisy) {
      noise = token_noise_bits(sampling.seed, position, static_cast<uint32_t>(base) / 4);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (base + i >= end) continue;
      const float logit = row[base + i];
      if (logit != logit) continue;
      const uint64_t entry = entry_of(logit, base + i);
      likeliest = entry > likeliest ? entry : likeliest;
      if (noisy) {
        const float score = noisy_score(sampling, logit, base + i, noise);
        const uint64_t noisy_entry = entry_of(score, base + i);
        noisiest = noisy_entry > noisiest ? noisy_entry : noisiest;
      }
    }
  }
  likeliest = block_largest<kThreads>(scratch, likeliest);
  noisiest = block_largest<kThreads>(scratch, noisiest);
  if (threadIdx.x == 0) {
    uint64_t* best = chunk_best + static_cast<int64_t>(blockIdx.y) * 2 * gridDim.x + blockIdx.x;
    best[0] = likeliest;
    best[gridDim.x] = noisiest;
  }
}

// The tokens that are kept: those with a key above `key`, and those with that key up to `token`.
struct Cut {
  uint32_t key;
  int token;

  __device__ __forceinline__ bool keeps(uint32_t other_key, int other_token) const {
    return other_key > key || (other_key == key && other_token <= token);
  }
};

// A histogram of 64-bit sums out of native 32-bit atomics, in copies that groups of warps share.
struct MassHistogram {
  static constexpr int kCopies = 4;
  unsigned low[kCopies][kDigits];
  unsigned high[kCopies][kDigits];

  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < kCopies * kDigits; i += kRowThreads) {
      low[i / kDigits][i % kDigits] = 0;
      high[i / kDigits][i % kDigits] = 0;
    }
  }
  __device__ __forceinline__ void add(int digit, Mass mass) {
    const int copy = threadIdx.x / kWarp % kCopies;
    const auto part = static_cast<unsigned>(mass);
    const unsigned carry = atomicAdd(&low[copy][digit], part) > ~part ? 1 : 0;
    const unsigned upper = static_cast<unsigned>(mass >> 32) + carry;
    if (upper != 0) atomicAdd(&high[copy][digit], upper);
  }
  __device__ __forceinline__ Mass sum(int digit) const {
    Mass total = 0;
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      total += static_cast<Mass>(high[copy][digit]) << 32 | low[copy][digit];
    }
    return total;
  }
};

struct RowScratch {
  MassHistogram masses;
  Mass histogram[kDigits];
  uint32_t key;
  Mass wanted;
  Mass total;
  unsigned warp_counts[kRowThreads / kWarp];
  int token;
  uint64_t largest[kRowThreads / kWarp];
};

// The cut behind the first tokens whose weights sum to `wanted` > 0 among those that `cut` keeps
// (all of them, where the sum stays below). weight(logit) is the same for equal logits.
template <typename Weight>
__device__ __forceinline__ Cut cut_at(RowScratch& scratch, const float* row, int vocab,
                                      const Cut& cut, Mass wanted, const Weight& weight) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) {
    scratch.key = 0;
    scratch.wanted = wanted;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    scratch.masses.clear();
    __syncthreads();
    const uint32_t upper = shift == 24 ? 0 : ~uint32_t{0} << (shift + 8);
    const uint32_t prefix = scratch.key;
    for (int i = threadIdx.x; i < vocab; i += kRowThreads) {
      const float logit = row[i];
      const uint32_t key = order_key(logit);
      if ((key & upper) != prefix || !cut.keeps(key, i)) continue;
      const Mass mass = weight(logit);
      if (mass != 0) scratch.masses.add(static_cast<int>(key >> shift & 255), mass);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kDigits; i += kRowThreads) {
      scratch.histogram[i] = scratch.masses.sum(i);
    }
    __syncthreads();
    if (warp == 0) {
      Mass above;
      const int digit = find_digit(scratch.histogram, scratch.wanted, above);
      __syncwarp();
      if (lane == 0) {
        scratch.key = prefix | static_cast<uint32_t>(digit) << shift;
        scratch.wanted -= above < scratch.wanted ? above : scratch.wanted;
      }
    }
    __syncthreads();
  }
  // Of the tokens with that key as many as the rest of the sum needs, lower tokens first.
  const uint32_t least = scratch.key;
  const Mass rest = scratch.wanted;
  if (threadIdx.x == 0) scratch.token = vocab;
  __syncthreads();
  Mass before = 0;  // equals seen
  for (int base = 0; base < vocab; base += kRowThreads) {
    const int i = base + threadIdx.x;
    const float logit = i < vocab ? row[i] : 0.0f;
    const bool tie = i < vocab && order_key(logit) == least && cut.keeps(least, i);
    const unsigned lanes = __ballot_sync(kAllLanes, tie);
    if (lane == 0) scratch.warp_counts[warp] = __popc(lanes);
    __syncthreads();
    Mass at = before;
    for (int w = 0; w < kRowThreads / kWarp; ++w) {
      if (w < warp) at += scratch.warp_counts[w];
      before += scratch.warp_counts[w];
    }
    at += __popc(lanes & ((1u << lane) - 1));
    if (tie) {
      const Mass each = weight(logit);
      if (at * each < rest && (at + 1) * each >= rest) scratch.token = i;
    }
    __syncthreads();
  }
  return {least, scratch.token};
}

__global__ void __launch_bounds__(kRowThreads, 1)
    choose_kernel(int32_t* tokens, const float* logits, int64_t stride, int vocab,
                  const Sampling* of_request, const int32_t* positions, const uint64_t* chunk_best,
                  int chunks) {
  SHARED(RowScratch, scratch);
  dependency_launch();
  dependency_wait();
  const Sampling sampling = *of_request;
  const float* row = logits + blockIdx.x * stride;
  const int32_t position = positions[blockIdx.x];
  const uint64_t* best = chunk_best + static_cast<int64_t>(blockIdx.x) * 2 * chunks;
  uint64_t likeliest = 0;
  uint64_t noisiest = 0;
  for (int c = threadIdx.x; c < chunks; c += kRowThreads) {
    likeliest = best[c] > likeliest ? best[c] : likeliest;
    noisiest = best[chunks + c] > noisiest ? best[chunks + c] : noisiest;
  }
  likeliest = block_largest<kRowThreads>(scratch.largest, likeliest);
  noisiest = block_largest<kRowThreads>(scratch.largest, noisiest);
  const int top = likeliest == 0 ? 0 : entry_index(likeliest);
  const float max = row[top];
  // The likeliest token's own score: where it is infinite or NaN there is nothing to draw from.
  const bool draws =
      sampling.temperature > 0.0f && isfinite(noisy_score(sampling, max, top, position));
  if (!draws || !filters(sampling, vocab)) {
    if (threadIdx.x == 0) {
      tokens[blockIdx.x] = draws && noisiest != 0 ? entry_index(noisiest) : top;
    }
    return;  // the whole block
  }

  const auto weight = [&](float logit) { return expf((logit - max) / sampling.temperature); };
  const auto mass = [&](float logit) {
    return logit == logit ? static_cast<Mass>(static_cast<double>(weight(logit)) * kUnitMass + 0.5)
                          : Mass{0};
  };
  Cut cut{0, vocab};
  if (sampling.top_k > 0 && sampling.top_k < vocab) {
    cut = cut_at(scratch, row, vocab, cut, static_cast<Mass>(sampling.top_k),
                 [](float logit) { return logit == logit ? Mass{1} : Mass{0}; });
  }
  if (sampling.top_p < 1.0f) {
    if (threadIdx.x == 0) scratch.total = 0;
    __syncthreads();
    Mass sum = 0;
    for (int i = threadIdx.x; i < vocab; i += kRowThreads) {
      if (cut.keeps(order_key(row[i]), i)) sum += mass(row[i]);
    }
    atomicAdd(&scratch.total, sum);
    __syncthreads();
    const auto wanted = static_cast<Mass>(static_cast<double>(scratch.total) * sampling.top_p);
    cut = cut_at(scratch, row, vocab, cut, wanted > 0 ? wanted : 1, mass);
  }
  uint64_t chosen = 0;
  for (int i = threadIdx.x; i < vocab; i += kRowThreads) {
    const float logit = row[i];
    if (logit != logit || !cut.keeps(order_key(logit), i)) continue;
    if (sampling.min_p > 0.0f && weight(logit) < sampling.min_p) continue;
    const uint64_t entry = entry_of(noisy_score(sampling, logit, i, position), i);
    chosen = entry > chosen ? entry : chosen;
  }
  chosen = block_largest<kRowThreads>(scratch.largest, chosen);
  if (threadIdx.x == 0) tokens[blockIdx.x] = chosen == 0 ? top : entry_index(chosen);
}

}  // namespace

int64_t choice_chunks(int64_t vocab) { return ceil_div(vocab, kChunk); }

void choose_tokens(int32_t* tokens, const Tensor& logits, const Sampling* sampling,
                   const int32_t* positions, const ChoiceScratch& scratch, cudaStream_t stream) {
  FRSPEC_CHECK(logits.dtype == DType::kF32 && logits.cols > 0, Error,
               "choose_tokens: logits must be fp32");
  if (logits.rows == 0) return;
  const auto chunks = static_cast<unsigned>(choice_chunks(logits.cols));
  const auto rows = static_cast<unsigned>(logits.rows);
  FRSPEC_CHECK(size_t{rows} * 2 * chunks <= scratch.entries, Error, "choose_tokens: logits [",
               logits.rows, ", ", logits.cols, "] exceed the planned workspace");
  const float* data = static_cast<const float*>(logits.data);
  const int vocab = static_cast<int>(logits.cols);
  launch<scan_chunk_kernel>({dim3(chunks, rows), dim3(kThreads), stream}, "choose_tokens", data,
                            logits.stride, vocab, sampling, positions, scratch.chunk_best);
  launch<choose_kernel>({dim3(rows), dim3(kRowThreads), stream}, "choose_tokens", tokens, data,
                        logits.stride, vocab, sampling, positions,
                        static_cast<const uint64_t*>(scratch.chunk_best), static_cast<int>(chunks));
}

}  // namespace frspec::cuda
