// Deliberate bugs in how kernels use memory: each must be noticed.
#include <cmath>
#include <cstdint>

#include "test_support.h"

namespace emulation {
namespace {

using frspec::cuda::bf16;
using frspec::cuda::dependency_wait;
using frspec::cuda::ldmatrix_x4;
using frspec::cuda::SmemCarver;

// ---- shared memory

__global__ void read_shared_outside(int* out, int offset) {
  dependency_wait();
  SHARED(int, first, [32]);
  SHARED(int, second, [32]);
  first[threadIdx.x] = 1;
  second[threadIdx.x] = 2;
  __syncwarp();
  out[threadIdx.x] = *(&first[0] + threadIdx.x + offset);
}
TEST_CASE("planted: reading outside of static shared memory") {
  expect_noticed_by_asan("use-after-poison", [] { return ends<read_shared_outside>(32, 1); });
}

__global__ void write_shared_outside(int* out, int offset) {
  dependency_wait();
  SHARED(int, values, [32]);
  *(&values[0] + threadIdx.x + offset) = 1;
  __syncwarp();
  out[threadIdx.x] = values[threadIdx.x];
}
TEST_CASE("planted: writing outside of static shared memory") {
  expect_noticed(kAddressSanitizer ? "use-after-poison" : "shared memory of values",
                 [] { return ends<write_shared_outside>(32, 1); });
}

__global__ void read_carved_outside(int* out, int offset) {
  dependency_wait();
  SmemCarver carver;
  int* first = carver.take<int>(32);
  int* second = carver.take<int>(32);
  first[threadIdx.x] = 1;
  second[threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = first[threadIdx.x + offset];
}
TEST_CASE("planted: reading outside of dynamic shared memory") {
  expect_noticed_by_asan("use-after-poison", [] {
    const Stream stream;
    const DeviceArray<int> out(32);
    launch<read_carved_outside>(one_block(32, stream, 256), "planted", out.data(), 1);
    stream.synchronize();
    return true;
  });
}

__global__ void carve_too_much(int* out) {
  dependency_wait();
  SmemCarver carver;
  int* values = carver.take<int>(320);
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}
TEST_CASE("planted: more dynamic shared memory than launched with") {
  expect_noticed("bytes carved", [] { return ends<carve_too_much>(32); });
}

__global__ void carve_differently(int* out) {
  dependency_wait();
  SmemCarver carver;
  int* values = carver.take<int>(threadIdx.x < 16 ? 16 : 32);
  values[threadIdx.x % 16] = 1;
  out[threadIdx.x] = 0;
}
TEST_CASE("planted: threads carve differently") {
  expect_noticed("differently", [] {
    const Stream stream;
    const DeviceArray<int> out(32);
    launch<carve_differently>(one_block(32, stream, 256), "planted", out.data());
    stream.synchronize();
    return true;
  });
}

__global__ void uninitialised_shared(float* out) {
  dependency_wait();
  SHARED(float, values, [64]);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x] + values[threadIdx.x + 32];
}
TEST_CASE("planted: shared memory is not initialised") {
  expect_noticed(kWrongResult, [] {
    const Stream stream;
    const DeviceArray<float> out(32);
    launch<uninitialised_shared>(one_block(32, stream), "planted", out.data());
    return !std::isnan(out.download(stream)[0]);
  });
}

__global__ void misaligned_ldmatrix(uint32_t* out) {
  dependency_wait();
  SHARED(bf16, tile, [17][16]);
  uint32_t registers[4];
  ldmatrix_x4(registers, &tile[threadIdx.x % 16][threadIdx.x / 16 * 8 + 1]);
  out[threadIdx.x] = registers[0];
}
TEST_CASE("planted: ldmatrix of a misaligned row") {
  expect_noticed("ldmatrix", [] {
    const Stream stream;
    const DeviceArray<uint32_t> out(32);
    launch<misaligned_ldmatrix>(one_block(32, stream), "planted", out.data());
    stream.synchronize();
    return true;
  });
}

// ---- global and local memory

__global__ void write_outside(int* out, int offset) {
  dependency_wait();
  out[static_cast<int>(threadIdx.x) + offset] = 1;
}
TEST_CASE("planted: writing far outside of global memory") {
  expect_noticed(kAddressSanitizer  ? "AddressSanitizer"
                 : kThreadSanitizer ? "SIGSEGV"
                                    : "outside of every allocation",
                 [] { return ends<write_outside>(64, 64); });
}
TEST_CASE("planted: writing one element behind an allocation") {
  expect_noticed(kAddressSanitizer ? "AddressSanitizer" : "next to an allocation",
                 [] { return ends<write_outside>(63, 1); });
}
TEST_CASE("planted: writing one element before an allocation") {
  expect_noticed(kAddressSanitizer ? "use-after-poison" : "next to an allocation",
                 [] { return ends<write_outside>(64, -1); });
}

__global__ void read_misaligned(float* out, const float* in, int offset) {
  dependency_wait();
  out[threadIdx.x] = reinterpret_cast<const float4*>(in + offset + threadIdx.x * 4)->x;
}
TEST_CASE("planted: a misaligned vector load") {
  expect_noticed_by_asan("misaligned address", [] {
    const Stream stream;
    const DeviceArray<float> in(256);
    const DeviceArray<float> out(32);
    launch<read_misaligned>(one_block(32, stream), "planted", out.data(),
                            static_cast<const float*>(in.data()), 1);
    stream.synchronize();
    return true;
  });
}

__global__ void local_outside(int* out, int index) {
  dependency_wait();
  int values[8];
  for (int i = 0; i < 8; ++i) values[i] = i;
  out[threadIdx.x] = *(&values[0] + index);
}
TEST_CASE("planted: reading outside of a local array") {
  // By UndefinedBehaviorSanitizer, where it comes first.
  expect_noticed_by_asan("", [] { return ends<local_outside>(32, 8); });
}

int recurse(int depth) {
  volatile char frame[1024];
  frame[depth % 1024] = static_cast<char>(depth);
  return depth == 0 ? frame[0] : recurse(depth - 1) + frame[depth % 1024];
}
__global__ void overflow_stack(int* out, int depth) {
  dependency_wait();
  out[threadIdx.x] = recurse(depth);
}
TEST_CASE("planted: the stack of a thread overflows") {
  // AddressSanitizer reports it, if it is not busy with the frames.
  if (kAddressSanitizer || kThreadSanitizer) return;
  expect_noticed("overflows", [] { return ends<overflow_stack>(32, 1000); });
}

}  // namespace
}  // namespace emulation
