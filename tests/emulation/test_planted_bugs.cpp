// Deliberate bugs in how the threads of a kernel, and kernels, wait for each other: each must be
// noticed.
#include <vector>

#include "test_support.h"

namespace emulation {
namespace {

using frspec::cuda::copy_async_16;
using frspec::cuda::copy_async_commit;
using frspec::cuda::copy_async_wait;
using frspec::cuda::dependency_launch;
using frspec::cuda::dependency_wait;

constexpr unsigned kAll = 0xffffffffu;

// ---- barriers and warps

__global__ void missing_syncthreads(int* out) {
  dependency_wait();
  SHARED(int, values, [64]);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[63 - threadIdx.x];
}
TEST_CASE("planted: missing __syncthreads") {
  expect_noticed(kRace, [] {
    return right_in_both_orders(
        [] { return gives<missing_syncthreads>(64, [](int i) { return 63 - i; }); });
  });
}

__global__ void missing_syncwarp(int* out) {
  dependency_wait();
  SHARED(int, values, [32]);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}
TEST_CASE("planted: missing __syncwarp") {
  expect_noticed(kRace, [] {
    return right_in_both_orders(
        [] { return gives<missing_syncwarp>(32, [](int i) { return i ^ 1; }); });
  });
}

// The slot is written again before all have read it.
__global__ void missing_second_barrier(int* out) {
  dependency_wait();
  SHARED(int, slot);
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 32) slot = round + 1;
    __syncthreads();
    sum += slot;
  }
  out[threadIdx.x] = sum;
}
TEST_CASE("planted: missing second __syncthreads in a loop") {
  expect_noticed(kRace, [] {
    return right_in_both_orders(
        [] { return gives<missing_second_barrier>(64, [](int) { return 6; }); });
  });
}

__global__ void exit_before_barrier(int* out, int count) {
  dependency_wait();
  if (static_cast<int>(threadIdx.x) >= count) return;
  out[threadIdx.x] = 1;
  __syncthreads();
}
TEST_CASE("planted: threads exit before a barrier") {
  expect_noticed("a thread exits while others wait",
                 [] { return ends<exit_before_barrier>(64, 60); });
}

__global__ void two_barriers(int* out) {
  dependency_wait();
  if (threadIdx.x < 32) {
    __syncthreads();
    out[0] = 1;
  } else {
    out[1] = 1;
    __syncthreads();
  }
}
TEST_CASE("planted: threads meet at different barriers") {
  expect_noticed("different barriers", [] { return ends<two_barriers>(64); });
}

__global__ void divergent_shuffle(int* out) {
  dependency_wait();
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16) value = __shfl_xor_sync(kAll, value, 1);
  out[threadIdx.x] = value;
}
TEST_CASE("planted: shuffle in a divergent branch") {
  expect_noticed("no thread can go on", [] { return ends<divergent_shuffle>(32); });
}

__global__ void unequal_masks(int* out) {
  dependency_wait();
  const unsigned mask = threadIdx.x == 7 ? 0xffffu : kAll;
  out[threadIdx.x] = __shfl_xor_sync(mask, static_cast<int>(threadIdx.x), 1);
}
TEST_CASE("planted: lanes give different masks") {
  expect_noticed("different masks", [] { return ends<unequal_masks>(32); });
}

__global__ void foreign_lane(int* out) {
  dependency_wait();
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16) value = __shfl_sync(0xffffu, value, 20);
  out[threadIdx.x] = value;
}
TEST_CASE("planted: shuffle from a lane outside of the mask") {
  expect_noticed("not in the mask", [] { return ends<foreign_lane>(32); });
}

__global__ void unnamed_lane(int* out) {
  dependency_wait();
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, static_cast<int>(threadIdx.x), 1);
}
TEST_CASE("planted: the mask does not name the caller") {
  expect_noticed("does not name the calling lane", [] { return ends<unnamed_lane>(32); });
}

__global__ void full_warp_shuffle(int* out) {
  dependency_wait();
  out[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
}
TEST_CASE("planted: the mask names lanes that the block does not have") {
  expect_noticed("does not have", [] { return ends<full_warp_shuffle>(33); });
}

__global__ void poll_forever(int* out) {
  dependency_wait();
  while (*const_cast<volatile int*>(out) != 1) __nanosleep(10);
}
TEST_CASE("planted: polling for what never comes") {
  expect_noticed("polls", [] { return ends<poll_forever>(32); });
}

__global__ void false_assumption(int* out, int count) {
  dependency_wait();
  __builtin_assume(count > 0);
  out[threadIdx.x] = count;
}
TEST_CASE("planted: a false assumption") {
  expect_noticed("count > 0", [] { return ends<false_assumption>(32, 0); });
}

// ---- asynchronous copies

__global__ void copy_without_wait(int* out, const int* in) {
  dependency_wait();
  SHARED(int, tile, [128]);
  copy_async_16(&tile[threadIdx.x * 4], in + threadIdx.x * 4);
  copy_async_commit();
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x * 4];
}
TEST_CASE("planted: asynchronous copy without a wait") {
  expect_noticed(kWrongResult, [] {
    const DeviceArray<int> in(counting(128));
    return gives<copy_without_wait>(
        32, [](int i) { return 4 * i; }, in.data());
  });
}

__global__ void copy_without_barrier(int* out, const int* in) {
  dependency_wait();
  SHARED(int, tile, [128]);
  copy_async_16(&tile[threadIdx.x * 4], in + threadIdx.x * 4);
  copy_async_commit();
  copy_async_wait<0>();
  out[threadIdx.x] = tile[(threadIdx.x ^ 1) * 4];
}
TEST_CASE("planted: no barrier behind the wait for a copy") {
  expect_noticed(kRace, [] {
    const DeviceArray<int> in(counting(128));
    return right_in_both_orders([&] {
      return gives<copy_without_barrier>(
          32, [](int i) { return 4 * (i ^ 1); }, in.data());
    });
  });
}

__global__ void copy_uncommitted(int* out, const int* in) {
  dependency_wait();
  SHARED(int, tile, [128]);
  copy_async_16(&tile[threadIdx.x * 4], in + threadIdx.x * 4);
  copy_async_wait<0>();
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x * 4];
}
TEST_CASE("planted: a copy is not committed") {
  expect_noticed(kWrongResult, [] {
    const DeviceArray<int> in(counting(128));
    return gives<copy_uncommitted>(
        32, [](int i) { return 4 * i; }, in.data());
  });
}

__global__ void wait_for_one_too_few(int* out, const int* in) {
  dependency_wait();
  SHARED(int, tiles, [2][128]);
  for (int stage = 0; stage < 2; ++stage) {
    copy_async_16(&tiles[stage][threadIdx.x * 4], in + stage * 128 + threadIdx.x * 4);
    copy_async_commit();
  }
  copy_async_wait<1>();
  __syncwarp();
  out[threadIdx.x] = tiles[0][threadIdx.x] + tiles[1][threadIdx.x];
}
TEST_CASE("planted: waiting for one group of copies too few") {
  expect_noticed(kWrongResult, [] {
    const DeviceArray<int> in(counting(256));
    return gives<wait_for_one_too_few>(
        32, [](int i) { return 2 * i + 128; }, in.data());
  });
}

// A ring of two stages, refilled before the other warp has read it.
__global__ void refill_early(int* out, const int* in, int chunks) {
  dependency_wait();
  SHARED(int, ring, [2][256]);
  const auto load = [&](int chunk) {
    if (chunk < chunks) {
      copy_async_16(&ring[chunk % 2][threadIdx.x * 4], in + chunk * 256 + threadIdx.x * 4);
    }
    copy_async_commit();
  };
  load(0);
  int sum = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    load(chunk + 1);
    copy_async_wait<1>();
    __syncthreads();
    sum += ring[chunk % 2][(threadIdx.x * 4 + 128) % 256];
    // missing: __syncthreads()
  }
  out[threadIdx.x] = sum;
}
TEST_CASE("planted: a stage of copies is refilled while in use") {
  expect_noticed(kRace, [] {
    const DeviceArray<int> in(counting(256 * 6));
    const auto expected = [](int i) { return 256 * 15 + 6 * ((i * 4 + 128) % 256); };
    return right_in_both_orders([&] { return gives<refill_early>(64, expected, in.data(), 6); });
  });
}

__global__ void copy_misaligned(int* out, const int* in) {
  dependency_wait();
  SHARED(int, tile, [128]);
  copy_async_16(&tile[threadIdx.x * 4], in + 1);
  out[threadIdx.x] = 0;
}
TEST_CASE("planted: asynchronous copy from a misaligned address") {
  expect_noticed("not aligned device memory", [] {
    const DeviceArray<int> in(counting(256));
    return ends<copy_misaligned>(32, in.data());
  });
}

// ---- dependent launches

__global__ void no_dependency_wait(int* out) {
  dependency_launch();
  out[threadIdx.x] = 1;
}
TEST_CASE("planted: a kernel without dependency_wait") {
  expect_noticed("ended without dependency_wait()", [] { return ends<no_dependency_wait>(32); });
}

__global__ void early_return(int* out, int count) {
  dependency_launch();
  if (static_cast<int>(threadIdx.x) >= count) return;
  dependency_wait();
  out[threadIdx.x] = 1;
}
TEST_CASE("planted: one thread returns before dependency_wait") {
  expect_noticed("ended without dependency_wait()", [] { return ends<early_return>(64, 63); });
}

__global__ void fill(int* out, int value) {
  dependency_launch();
  dependency_wait();
  out[threadIdx.x] = value;
}
__global__ void read_early(int* out, const int* in) {
  dependency_launch();
  const int value = in[threadIdx.x];
  dependency_wait();
  out[threadIdx.x] = value;
}
TEST_CASE("planted: reading before dependency_wait") {
  expect_noticed(kRace, [] {
    const Stream stream;
    const DeviceArray<int> between(32);
    const DeviceArray<int> out(32);
    launch<fill>(one_block(32, stream), "planted", between.data(), 5);
    launch<read_early>(one_block(32, stream), "planted", out.data(),
                       static_cast<const int*>(between.data()));
    return out.download(stream)[0] == 5;
  });
}

__global__ void copy_early(int* out, const int* in) {
  dependency_launch();
  SHARED(int, tile, [128]);
  copy_async_16(&tile[threadIdx.x * 4], in + threadIdx.x * 4);
  copy_async_commit();
  dependency_wait();
  copy_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = tile[threadIdx.x * 4 + i];
}
TEST_CASE("planted: an asynchronous copy asked for before dependency_wait") {
  expect_noticed(kRace, [] {
    const Stream stream;
    const DeviceArray<int> between(128);
    const DeviceArray<int> out(128);
    launch<fill>(one_block(128, stream), "planted", between.data(), 5);
    launch<copy_early>(one_block(32, stream), "planted", out.data(),
                       static_cast<const int*>(between.data()));
    return out.download(stream)[0] == 5;
  });
}

__global__ void write_early(int* out, int value) {
  dependency_launch();
  out[threadIdx.x] = value;
  dependency_wait();
}
__global__ void add_one(int* out, const int* in) {
  dependency_launch();
  dependency_wait();
  out[threadIdx.x] = in[threadIdx.x] + 1;
}
TEST_CASE("planted: writing before dependency_wait what is still read") {
  expect_noticed(kRace, [] {
    const Stream stream;
    const DeviceArray<int> between(std::vector<int>(32, 5));
    const DeviceArray<int> out(32);
    launch<add_one>(one_block(32, stream), "planted", out.data(),
                    static_cast<const int*>(between.data()));
    launch<write_early>(one_block(32, stream), "planted", between.data(), 7);
    return out.download(stream)[0] == 6;
  });
}

}  // namespace
}  // namespace emulation
