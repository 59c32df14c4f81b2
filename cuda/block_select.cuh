// Selection of the largest by one block. Of few: an entry's place is the number of larger ones. Of
// many: the k-th largest 32-bit key is found digit by digit from histograms, eight bits at a time,
// and what lies above it is collected. All of it is independent of the order in which threads run.
#pragma once

#include "device.cuh"

namespace frspec::cuda {

constexpr int kDigits = 256;

// (order key, ~index): a larger entry comes first, of equal keys the lower index. 0: nothing.
__device__ __forceinline__ uint64_t keyed_entry(uint32_t key, int index) {
  return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(index);
}
__device__ __forceinline__ uint64_t entry_of(float value, int index) {
  return keyed_entry(order_key(value), index);
}
__device__ __forceinline__ int entry_index(uint64_t entry) {
  return static_cast<int>(~static_cast<uint32_t>(entry));
}

// Calls emit(place, entry) for the k largest of `count` entries in shared memory, or all that are
// not 0: an entry's place is the number of larger ones.
template <int kThreads, typename Emit>
__device__ __forceinline__ void place_largest(const uint64_t* entries, int count, int k,
                                              const Emit& emit) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint64_t entry = entries[i];
    if (entry == 0) continue;
    int place = 0;
#pragma unroll 4
    for (int j = 0; j < count; ++j) place += entries[j] > entry ? 1 : 0;
    if (place < k) emit(place, entry);
  }
}

template <int kThreads>
struct SelectScratch {
  unsigned histogram[kDigits];
  uint32_t key;     // of the k-th largest, its upper digits so far
  unsigned wanted;  // how many with that key still belong to the k
  unsigned collected;
  unsigned warp_counts[kThreads / kWarp];
};

// Which digit the `wanted`-th largest lies in: called by all lanes of one warp over a histogram of
// any unsigned type whose sum reaches `wanted` > 0. Returns it and the sum above it.
template <typename Count>
__device__ __forceinline__ int find_digit(const Count* histogram, Count wanted, Count& above) {
  // Lane l owns the eight digits from 255 - 8 l downwards.
  const int lane = threadIdx.x % kWarp;
  Count own = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) own += histogram[255 - lane * 8 - i];
  Count up_to = own;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const Count other = __shfl_up_sync(kAllLanes, up_to, offset);
    if (lane >= offset) up_to += other;
  }
  const Count before = up_to - own;
  const unsigned owners = __ballot_sync(kAllLanes, before < wanted && wanted <= up_to);
  const int owner = owners == 0 ? kWarp - 1 : __ffs(static_cast<int>(owners)) - 1;
  int digit = 0;
  Count sum = before;
  if (lane == owner) {
    for (int i = 0; i < 8; ++i) {
      digit = 255 - lane * 8 - i;
      if (sum + histogram[digit] >= wanted || i == 7) break;
      sum += histogram[digit];
    }
  }
  above = __shfl_sync(kAllLanes, sum, owner);
  return __shfl_sync(kAllLanes, digit, owner);
}

// Calls emit(place, i) once for each of the `wanted` largest of key(0 ... count - 1), lower i first
// among equals, with places 0 ... wanted - 1; in no particular order, except that equals of the
// smallest key have the last places in ascending order. All threads of the block call it; 0 <=
// wanted <= count. Ends with a barrier.
template <int kThreads, typename Key, typename Emit>
__device__ __forceinline__ void block_select_largest(SelectScratch<kThreads>& scratch, int count,
                                                     int wanted, const Key& key, const Emit& emit) {
  if (wanted == 0) return;  // the same for all
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) {
    scratch.key = 0;
    scratch.wanted = static_cast<unsigned>(wanted);
    scratch.collected = 0;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kDigits; i += kThreads) scratch.histogram[i] = 0;
    __syncthreads();
    const uint32_t upper = shift == 24 ? 0 : ~uint32_t{0} << (shift + 8);
    const uint32_t prefix = scratch.key;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t k = key(i);
      if ((k & upper) == prefix) atomicAdd(&scratch.histogram[k >> shift & 255], 1u);
    }
    __syncthreads();
    if (warp == 0) {
      unsigned above;
      const int digit = find_digit(scratch.histogram, scratch.wanted, above);
      __syncwarp();
      if (lane == 0) {
        scratch.key = prefix | static_cast<uint32_t>(digit) << shift;
        scratch.wanted -= above;
      }
    }
    __syncthreads();
  }
  const uint32_t least = scratch.key;
  const int ties = static_cast<int>(scratch.wanted);
  // Those above the key, in any order; then the first `ties` of those that equal it.
  int found = 0;
  for (int base = 0; base < count; base += kThreads) {
    const int i = base + threadIdx.x;
    const uint32_t k = i < count ? key(i) : 0;
    if (i < count && k > least) {
      emit(static_cast<int>(atomicAdd(&scratch.collected, 1u)), i);
    }
    const bool tie = i < count && k == least;
    const unsigned lanes = __ballot_sync(kAllLanes, tie);
    if (lane == 0) scratch.warp_counts[warp] = __popc(lanes);
    __syncthreads();
    int at = found;
    for (int w = 0; w < kThreads / kWarp; ++w) {
      const int of_warp = static_cast<int>(scratch.warp_counts[w]);
      if (w < warp) at += of_warp;
      found += of_warp;
    }
    at += __popc(lanes & ((1u << lane) - 1));
    if (tie && at < ties) emit(wanted - ties + at, i);
    __syncthreads();
  }
}

}  // namespace frspec::cuda
