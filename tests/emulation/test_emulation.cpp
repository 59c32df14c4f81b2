// The device language as emulated, against its definition.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "test_support.h"

namespace emulation {
namespace {

using frspec::cuda::bf16;
using frspec::cuda::dependency_launch;
using frspec::cuda::dependency_wait;
using frspec::cuda::exp2_approximate;
using frspec::cuda::fp16;
using frspec::cuda::from_float;
using frspec::cuda::ldmatrix_x2;
using frspec::cuda::ldmatrix_x4;
using frspec::cuda::ldmatrix_x4_transposed;
using frspec::cuda::mma_16x8x16;
using frspec::cuda::SmemCarver;
using frspec::cuda::to_float;
using frspec::cuda::warp_sum;

constexpr unsigned kAll = 0xffffffffu;

// One launch of a block, and what it wrote.
template <auto Kernel, typename T, typename... Args>
std::vector<T> run(unsigned threads, size_t count, size_t shared_bytes, Args... args) {
  const Stream stream;
  const DeviceArray<T> out(count);
  launch<Kernel>(one_block(threads, stream, shared_bytes), "test", out.data(), args...);
  return out.download(stream);
}

// ---- tensor cores

// D = A . B + C twice, the second time with B's fragments by a transposing load.
template <typename T>
__global__ void multiply(float* d, const T* a, const T* b, const float* c) {
  dependency_wait();
  SHARED(T, a_tile, [16][16]);
  SHARED(T, b_columns, [8][16]);  // b transposed
  SHARED(T, b_rows, [16][8]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) a_tile[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) {
    b_rows[i / 8][i % 8] = b[i];
    b_columns[i % 8][i / 8] = b[i];
  }
  __syncwarp();
  uint32_t a_fragments[4], b_fragments[2], b_transposed[4];
  ldmatrix_x4(a_fragments, &a_tile[lane % 16][lane / 16 * 8]);
  ldmatrix_x2(b_fragments, &b_columns[lane % 8][lane / 8 % 2 * 8]);
  ldmatrix_x4_transposed(b_transposed, &b_rows[lane % 16][0]);
  const uint32_t b_again[2] = {b_transposed[0], b_transposed[1]};
  const auto place = [&](int i) { return (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2; };
  float first[4], second[4];
  for (int i = 0; i < 4; ++i) first[i] = second[i] = c[place(i)];
  mma_16x8x16<T>(first, a_fragments, b_fragments);
  mma_16x8x16<T>(second, a_fragments, b_again);
  for (int i = 0; i < 4; ++i) {
    d[place(i)] = first[i];
    d[128 + place(i)] = second[i];
  }
}

template <typename T>
std::vector<T> random_elements(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values;
  for (size_t i = 0; i < count; ++i) values.push_back(from_float<T>(normal(random)));
  return values;
}

TEST_CASE_TEMPLATE("mma and ldmatrix against their definition", T, bf16, fp16) {
  const FreshDevice fresh;
  std::vector<T> a = random_elements<T>(256, 1);
  std::vector<T> b = random_elements<T>(128, 2);
  a[3] = from_float<T>(1e-7f);  // subnormal in fp16
  b[17] = from_float<T>(-6e-8f);
  std::vector<float> c;
  for (int i = 0; i < 128; ++i) c.push_back(0.01f * static_cast<float>(i));
  const DeviceArray<T> device_a(a), device_b(b);
  const DeviceArray<float> device_c(c);
  const auto d = run<multiply<T>, float>(32, 256, 0, static_cast<const T*>(device_a.data()),
                                         static_cast<const T*>(device_b.data()),
                                         static_cast<const float*>(device_c.data()));
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        sum += static_cast<double>(to_float(a[static_cast<size_t>(row * 16 + k)])) *
               to_float(b[static_cast<size_t>(k * 8 + column)]);
      }
      const auto at = static_cast<size_t>(row * 8 + column);
      CHECK(d[at] == static_cast<float>(sum + c[at]));
      CHECK(d[128 + at] == d[at]);
    }
  }
}

TEST_CASE_TEMPLATE("mma of infinities and NaN", T, bf16, fp16) {
  const FreshDevice fresh;
  std::vector<T> a(256, from_float<T>(1)), b(128, from_float<T>(1));
  a[0] = from_float<T>(INFINITY);
  a[16] = from_float<T>(-INFINITY);
  a[32] = from_float<T>(NAN);
  const DeviceArray<T> device_a(a), device_b(b);
  const DeviceArray<float> c(std::vector<float>(128, 0.0f));
  const auto d = run<multiply<T>, float>(32, 256, 0, static_cast<const T*>(device_a.data()),
                                         static_cast<const T*>(device_b.data()),
                                         static_cast<const float*>(c.data()));
  CHECK(d[0] == INFINITY);
  CHECK(d[8] == -INFINITY);
  CHECK(std::isnan(d[16]));
  CHECK(d[24] == 16);
}

__global__ void load_fragments(uint32_t* out, int transposed) {
  dependency_wait();
  SHARED(uint16_t, tile, [32][8]);
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) {
    tile[i / 8][i % 8] = static_cast<uint16_t>(i);
  }
  __syncwarp();
  uint32_t registers[4];
  if (transposed != 0) {
    ldmatrix_x4_transposed(registers, &tile[threadIdx.x][0]);
  } else {
    ldmatrix_x4(registers, &tile[threadIdx.x][0]);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + static_cast<unsigned>(i)] = registers[i];
}

TEST_CASE("ldmatrix: which lane gets which elements") {
  const FreshDevice fresh;
  for (const bool transposed : {false, true}) {
    const auto out = run<load_fragments, uint32_t>(32, 128, 0, transposed ? 1 : 0);
    for (uint32_t lane = 0; lane < 32; ++lane) {
      for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        const uint32_t group = lane / 4, pair = lane % 4 * 2;
        const uint32_t step = transposed ? 8 : 1;
        const uint32_t low = matrix * 64 + (transposed ? pair * 8 + group : group * 8 + pair);
        CHECK(out[lane * 4 + matrix] == (low | (low + step) << 16));
      }
    }
  }
}

__global__ void load_columns(uint32_t* out, int pitch) {
  dependency_wait();
  SmemCarver carver;
  bf16* tile = carver.take<bf16>(32 * 64);
  for (int i = static_cast<int>(threadIdx.x); i < 32 * 64; i += 32) tile[i] = from_float<bf16>(0);
  __syncwarp();
  uint32_t registers[4];
  ldmatrix_x4(registers, tile + static_cast<int>(threadIdx.x) * pitch);
  out[threadIdx.x] = registers[0];
}

TEST_CASE("ldmatrix: bank conflicts are counted") {
  const FreshDevice fresh;
  statistics().ldmatrix_bank_conflicts = 0;
  run<load_columns, uint32_t>(32, 32, 4096, 8);
  CHECK(statistics().ldmatrix_bank_conflicts == 0);
  run<load_columns, uint32_t>(32, 32, 4096, 64);
  CHECK(statistics().ldmatrix_bank_conflicts == 4 * 7);
}

__global__ void powers_of_two(float* out, float x) {
  dependency_wait();
  out[0] = exp2_approximate(x);
}

TEST_CASE("exp2_approximate") {
  const FreshDevice fresh;
  CHECK(run<powers_of_two, float>(1, 1, 0, 3.0f)[0] == 8);
  CHECK(run<powers_of_two, float>(1, 1, 0, -INFINITY)[0] == 0);
  CHECK(run<powers_of_two, float>(1, 1, 0, -126.5f)[0] == 0);
  CHECK(std::isnan(run<powers_of_two, float>(1, 1, 0, NAN)[0]));
}

// ---- warps

__global__ void shuffles(int* out) {
  dependency_wait();
  const int lane = static_cast<int>(threadIdx.x);
  int* row = out + lane * 6;
  row[0] = __shfl_sync(kAll, lane, 5);
  row[1] = __shfl_sync(kAll, lane, 3, 8);
  row[2] = __shfl_up_sync(kAll, lane, 2, 16);
  row[3] = __shfl_down_sync(kAll, lane, 2, 16);
  row[4] = __shfl_xor_sync(kAll, lane, 7);
  row[5] = lane < 16 ? __shfl_xor_sync(0xffffu, lane, 8) : -1;
}

TEST_CASE("shuffles") {
  const FreshDevice fresh;
  const auto out = run<shuffles, int>(32, 32 * 6, 0);
  for (int lane = 0; lane < 32; ++lane) {
    const int* row = &out[static_cast<size_t>(lane) * 6];
    CHECK(row[0] == 5);
    CHECK(row[1] == lane / 8 * 8 + 3);
    CHECK(row[2] == (lane % 16 < 2 ? lane : lane - 2));
    CHECK(row[3] == (lane % 16 > 13 ? lane : lane + 2));
    CHECK(row[4] == (lane ^ 7));
    CHECK(row[5] == (lane < 16 ? lane ^ 8 : -1));
  }
}

__global__ void votes(unsigned* out) {
  dependency_wait();
  const unsigned lane = threadIdx.x;
  unsigned* row = out + lane * 8;
  row[0] = __ballot_sync(kAll, lane % 3 == 0);
  row[1] = static_cast<unsigned>(__any_sync(kAll, lane == 9));
  row[2] = static_cast<unsigned>(__all_sync(kAll, lane != 9));
  row[3] = __match_any_sync(kAll, lane / 10);
  row[4] = __reduce_add_sync(kAll, lane);
  row[5] = static_cast<unsigned>(__reduce_min_sync(kAll, static_cast<int>(lane) - 4));
  row[6] = __reduce_max_sync(kAll, lane);
  row[7] = __reduce_xor_sync(kAll, lane + 1);
}

TEST_CASE("votes, matches and reductions") {
  const FreshDevice fresh;
  const auto out = run<votes, unsigned>(32, 32 * 8, 0);
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned* row = &out[lane * 8];
    CHECK(row[0] == 0x49249249u);
    CHECK(row[1] == 1);
    CHECK(row[2] == 0);
    CHECK(row[3] == (lane >= 30 ? 3u << 30 : 0x3ffu << lane / 10 * 10));
    CHECK(row[4] == 496);
    CHECK(static_cast<int>(row[5]) == -4);
    CHECK(row[6] == 31);
    CHECK(row[7] == 32);
  }
}

__global__ void block_votes(int* out) {
  dependency_wait();
  const int i = static_cast<int>(threadIdx.x);
  out[i * 3] = __syncthreads_count(i % 3 == 0);
  out[i * 3 + 1] = __syncthreads_or(i == 70);
  out[i * 3 + 2] = __syncthreads_and(i != 70);
}

TEST_CASE("barriers that vote") {
  const FreshDevice fresh;
  const auto out = run<block_votes, int>(96, 96 * 3, 0);
  for (size_t i = 0; i < 96; ++i) {
    CHECK(out[i * 3] == 32);
    CHECK(out[i * 3 + 1] == 1);
    CHECK(out[i * 3 + 2] == 0);
  }
}

__global__ void poll_neighbour(int* out) {
  dependency_wait();
  SHARED(int, flag);
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x < 32) {
    while (atomicAdd(&flag, 0) == 0) __nanosleep(10);
  } else if (threadIdx.x == 32) {
    atomicExch(&flag, 1);
  }
  out[threadIdx.x] = 1;
}

TEST_CASE("a warp may poll for another one") {
  const FreshDevice fresh;
  CHECK(run<poll_neighbour, int>(64, 64, 0) == std::vector<int>(64, 1));
}

// ---- values of one thread

__global__ void bits(unsigned* out) {
  dependency_wait();
  out[0] = static_cast<unsigned>(__clz(1) * 100 + __ffs(8) * 10 + __popc(7));
  out[1] = __brev(1);
  out[2] = __byte_perm(0x33221100u, 0x77665544u, 0x7410u);
  out[3] = __umulhi(0x80000000u, 6);
  out[4] = static_cast<unsigned>(__umul64hi(1ull << 63, 6));
  out[5] = __float_as_uint(__saturatef(NAN)) + __float_as_uint(1.0f);
  out[6] = static_cast<unsigned>(__float2int_rn(2.5f)) * 10 +
           static_cast<unsigned>(__float2int_rd(2.9f));
  out[7] = static_cast<unsigned>(max(min(7, 5), 3));
}

TEST_CASE("bits and conversions") {
  const FreshDevice fresh;
  const auto out = run<bits, unsigned>(1, 8, 0);
  CHECK(out == std::vector<unsigned>{3143, 0x80000000u, 0x77441100u, 3, 3, 0x3f800000u, 22, 5});
}

__global__ void half_arithmetic(float* out) {
  dependency_wait();
  const bf16 x = from_float<bf16>(1.5f);
  const fp16 y = from_float<fp16>(1.5f);
  out[0] = to_float(__hfma(x, x, x));
  out[1] = to_float(__hfma(y, y, y));
  out[2] = to_float(__hfma2(__half2{y, y}, __half2{y, y}, __half2{y, y}).y);
  out[3] = to_float(hexp(from_float<bf16>(0)));
}

TEST_CASE("arithmetic of bf16 and fp16") {
  const FreshDevice fresh;
  CHECK(run<half_arithmetic, float>(1, 4, 0) == std::vector<float>{3.75f, 3.75f, 3.75f, 1});
}

__global__ void atomics(unsigned* out) {
  dependency_wait();
  atomicAdd(&out[0], 1);
  atomicMax(&out[1], threadIdx.x + blockIdx.x * blockDim.x);
  atomicOr(&out[2], 1u << threadIdx.x % 32);
  atomicAdd(reinterpret_cast<float*>(&out[3]), 0.5f);
  atomicInc(&out[4], 9);
  atomicCAS(&out[5], threadIdx.x + blockIdx.x * blockDim.x, threadIdx.x + blockIdx.x * blockDim.x);
}

TEST_CASE("atomics, over blocks on several OS threads") {
  const FreshDevice fresh;
  for (const int threads : {1, 3}) {
    config().threads = threads;
    const Stream stream;
    const DeviceArray<unsigned> out(std::vector<unsigned>(6, 0));
    launch<atomics>({.grid = dim3(20), .block = dim3(64), .stream = stream}, "atomics", out.data());
    CHECK(out.download(stream) ==
          std::vector<unsigned>{1280, 1279, kAll, __float_as_uint(640.0f), 0, 0});
  }
}

// ---- launches

__global__ void coordinates(int* out) {
  dependency_wait();
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  atomicAdd(&out[block * threads + thread], static_cast<int>(block * threads + thread));
}

TEST_CASE("every thread of every block runs once, in every order") {
  const FreshDevice fresh;
  for (const int os_threads : {1, 2}) {
    for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
      config().order = order;
      config().threads = os_threads;
      const Stream stream;
      const int count = 3 * 5 * 2 * 64;
      const DeviceArray<int> out(std::vector<int>(count, 0));
      launch<coordinates>({.grid = dim3(3, 5, 2), .block = dim3(8, 4, 2), .stream = stream},
                          "coordinates", out.data());
      CHECK(out.download(stream) == counting(count));
    }
  }
}

// Sums rows through shuffles, barriers, shared memory of both kinds and asynchronous copies.
__global__ void sum_rows(float* out, const float* in, int columns) {
  dependency_launch();
  SmemCarver carver;
  float* row = carver.take<float>(columns);
  SHARED(float, sums, [4]);
  dependency_wait();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < columns / 4; i += 128) {
    frspec::cuda::copy_async_16(row + 4 * i, in + static_cast<int>(blockIdx.x) * columns + 4 * i);
  }
  frspec::cuda::copy_async_commit();
  frspec::cuda::copy_async_wait<0>();
  __syncthreads();
  float sum = 0;
  for (int i = thread; i < columns; i += 128) sum += row[i];
  sum = warp_sum(sum);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) out[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
}

TEST_CASE("a chain of kernels gives the same bits in every order and mode") {
  const FreshDevice fresh;
  std::vector<float> values;
  for (int i = 0; i < 256 * 256; ++i) values.push_back(1.0f / static_cast<float>(1 + i % 1013));
  const DeviceArray<float> in(values);
  std::vector<float> expected;
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    for (const Copies copies : {Copies::kPoison, Copies::kDefer, Copies::kEager}) {
      for (const Streams streams : {Streams::kLazy, Streams::kImmediate}) {
        config().order = order;
        config().copies = copies;
        config().streams = streams;
        const Stream stream;
        const DeviceArray<float> between(256), out(1);
        const LaunchConfig rows{
            .grid = dim3(256), .block = dim3(128), .stream = stream, .shared_bytes = 1024};
        launch<sum_rows>(rows, "rows", between.data(), static_cast<const float*>(in.data()), 256);
        launch<sum_rows>(one_block(128, stream, 1024), "sum", out.data(),
                         static_cast<const float*>(between.data()), 256);
        const std::vector<float> found = out.download(stream);
        if (expected.empty()) expected = found;
        CHECK(found == expected);
      }
    }
  }
}

__global__ void fail_at(int* out, int thread, int how) {
  dependency_wait();
  int local[16];
  for (int i = 0; i < 16; ++i) local[i] = i;
  if (static_cast<int>(threadIdx.x) == thread && how == 0) __trap();
  if (static_cast<int>(threadIdx.x) == thread && how == 1) out[1 << 20] = 1;
  __syncthreads();
  out[threadIdx.x] = local[threadIdx.x % 16];
}

TEST_CASE("a failed kernel leaves the device usable") {
  const FreshDevice fresh;
  const Stream stream;
  const DeviceArray<int> out(64);
  for (int round = 0; round < 50; ++round) {
    // AddressSanitizer ends the process at an illegal access.
    const int how = kAddressSanitizer || kThreadSanitizer ? 0 : round % 2;
    const LaunchConfig blocks{.grid = dim3(3), .block = dim3(64), .stream = stream};
    std::string what;
    try {
      launch<fail_at>(blocks, "bad", out.data(), round, how);
      launch<fail_at>(blocks, "dropped", out.data(), -1, 0);
      stream.synchronize();
    } catch (const Error& error) {
      what = error.what();
    }
    CHECK(what.find("thread (" + std::to_string(round) + ",0,0)") != std::string::npos);
    CHECK(what.find(how == 0 ? "__trap()" : "illegal access") != std::string::npos);
    check(cudaMemsetAsync(out.data(), 0, 256, stream), "clear");
    launch<fail_at>(one_block(static_cast<unsigned>(64 - round), stream), "good", out.data(), -1,
                    0);
    const std::vector<int> found = out.download(stream);
    for (int i = 0; i < 64; ++i)
      CHECK(found[static_cast<size_t>(i)] == (i < 64 - round ? i % 16 : 0));
  }
}

__global__ void without_wait(int* out) { out[threadIdx.x] = 1; }

TEST_CASE("the check for dependency_wait can be switched off") {
  const FreshDevice fresh;
  config().require_dependency_wait = false;
  CHECK(run<without_wait, int>(32, 32, 0) == std::vector<int>(32, 1));
}

__global__ void many_pieces(int* out) {
  dependency_wait();
  SmemCarver first;
  int* a = first.take<int>(1);
  SmemCarver again;  // the same memory
  int* b = again.take<int>(1);
  out[0] = a == b ? 1 : 0;
  out[1] = reinterpret_cast<uintptr_t>(a) % 128 == 0 ? 1 : 0;
  out[2] = __isShared(a) && !__isGlobal(a) && __isGlobal(out) ? 1 : 0;
}

TEST_CASE("carved memory") {
  const FreshDevice fresh;
  CHECK(run<many_pieces, int>(1, 3, 128) == std::vector<int>{1, 1, 1});
}

}  // namespace
}  // namespace emulation
