// What Hopper's hardware does by itself, against its definition, and deliberate bugs in its use:
// each must be noticed.
#include <cmath>
#include <cstdint>
#include <vector>

#include "hopper.cuh"
#include "tensor_map.h"
#include "test_support.h"

namespace emulation {
namespace {

using frspec::DType;
using frspec::cuda::barrier_arrive_expecting;
using frspec::cuda::barrier_init;
using frspec::cuda::barrier_inits_done;
using frspec::cuda::barrier_wait;
using frspec::cuda::bf16;
using frspec::cuda::box_map;
using frspec::cuda::copy_box_async;
using frspec::cuda::dependency_wait;
using frspec::cuda::elected;
using frspec::cuda::fp16;
using frspec::cuda::from_float;
using frspec::cuda::SmemCarver;
using frspec::cuda::to_float;
using frspec::cuda::wgmma_64xN;
using frspec::cuda::wgmma_begin;
using frspec::cuda::wgmma_commit;
using frspec::cuda::wgmma_wait;

constexpr int kColumns = 64;  // of a box
template <typename T>
constexpr DType kType = std::is_same_v<T, bf16> ? DType::kBF16 : DType::kF16;

// Small integers, whose products and sums are exact.
float value_at(int row, int column) { return static_cast<float>((row * 7 + column * 3) % 9 - 4); }

template <typename T>
std::vector<T> matrix_of(int rows, int columns, int stride) {
  std::vector<T> values(static_cast<size_t>(rows * stride), from_float<T>(NAN));
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      values[static_cast<size_t>(r * stride + c)] = from_float<T>(value_at(r, c));
    }
  }
  return values;
}

// ---- boxes

constexpr int kBoxRows = 16;

// The box as it lies in shared memory.
__global__ void copy_one_box(uint16_t* out, const __grid_constant__ CUtensorMap map, int column,
                             int row) {
  dependency_wait();
  SmemCarver carver;
  auto* box = carver.take<uint16_t>(kBoxRows * kColumns);
  SHARED(uint64_t, barrier);
  if (threadIdx.x == 0) {
    barrier_init(&barrier);
    barrier_inits_done();
    barrier_arrive_expecting(&barrier, kBoxRows * kColumns * 2);
    copy_box_async(box, map, column, row, &barrier);
  }
  __syncthreads();
  barrier_wait(&barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kBoxRows * kColumns; i += 32) out[i] = box[i];
}

TEST_CASE("a box of a matrix: swizzled rows, zeros behind the matrix") {
  constexpr int kRows = 20;
  constexpr int kCols = 72;
  constexpr int kStride = 80;
  const Stream stream;
  const DeviceArray<fp16> matrix(matrix_of<fp16>(kRows, kCols, kStride));
  const CUtensorMap map = box_map(matrix.data(), DType::kF16, kRows, kCols, kStride, kBoxRows);
  for (const auto& [column, row] : {std::pair{0, 0}, {64, 8}, {8, 3}}) {
    const DeviceArray<uint16_t> out(kBoxRows * kColumns);
    launch<copy_one_box>(one_block(32, stream, kBoxRows * kColumns * 2), "test", out.data(), map,
                         column, row);
    const std::vector<uint16_t> found = out.download(stream);
    for (int r = 0; r < kBoxRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        const bool inside = row + r < kRows && column + c < kCols;
        const float expected = inside ? value_at(row + r, column + c) : 0.0f;
        const int place = r * kColumns + ((c / 8) ^ (r % 8)) * 8 + c % 8;
        CHECK(to_float(__ushort_as_half(found[static_cast<size_t>(place)])) == expected);
      }
    }
  }
}

TEST_CASE("tensor maps that a driver refuses") {
  const DeviceArray<bf16> matrix(4096);
  const auto map = [&](const bf16* data, int64_t rows, int64_t stride, int box_rows) {
    return box_map(data, DType::kBF16, rows, 64, stride, box_rows);
  };
  CHECK_NOTHROW(map(matrix.data(), 8, 64, 8));
  CHECK_THROWS_AS(map(matrix.data() + 1, 8, 64, 8), frspec::DeviceError);
  CHECK_THROWS_AS(map(matrix.data(), 8, 68, 8), frspec::DeviceError);
  CHECK_THROWS_AS(map(matrix.data(), 0, 64, 8), frspec::DeviceError);
  CHECK_THROWS_AS(map(matrix.data(), 8, 64, 257), frspec::DeviceError);
}

// ---- products

enum class Bug : uint8_t {
  kNone,
  kNoBarrierWait,
  kNoParity,
  kFewBytes,
  kManyBytes,
  kNoInit,
  kEarlyRefill,
  kNoProductWait,
  kNoBegin,
  kNoCommit,
  kMisplaced,
  kCopyLeft,
};

constexpr int kDepth = 3 * kColumns;
constexpr int kPlaces = 2;

// out = A . B^T, A [64, kDepth], B [8 kTiles, kDepth], through a ring of two places.
template <typename T, int kTiles, Bug kBug>
__global__ void multiply_boxes(float* out, const __grid_constant__ CUtensorMap a_map,
                               const __grid_constant__ CUtensorMap b_map) {
  dependency_wait();
  constexpr int kBoxA = 64 * kColumns;
  constexpr int kBoxB = kTiles * 8 * kColumns;
  SmemCarver carver;
  if (kBug == Bug::kMisplaced) carver.take<T>(kColumns);
  T* a = carver.take<T>(kPlaces * kBoxA);
  T* b = carver.take<T>(kPlaces * kBoxB);
  SHARED(uint64_t, barriers, [kPlaces]);
  const auto ask = [&](int stage) {
    if (threadIdx.x != 0) return;
    const int place = stage % kPlaces;
    constexpr int kBytes = (kBoxA + kBoxB) * static_cast<int>(sizeof(T));
    constexpr int kWrong = kBug == Bug::kFewBytes ? -16 : kBug == Bug::kManyBytes ? 16 : 0;
    barrier_arrive_expecting(barriers + place, kBytes + kWrong);
    copy_box_async(a + place * kBoxA, a_map, stage * kColumns, 0, barriers + place);
    copy_box_async(b + place * kBoxB, b_map, stage * kColumns, 0, barriers + place);
  };
  if (threadIdx.x == 0) {
    for (int place = 0; place < kPlaces - (kBug == Bug::kNoInit ? 1 : 0); ++place) {
      barrier_init(barriers + place);
    }
    barrier_inits_done();
  }
  ask(0);
  __syncthreads();
  float sums[kTiles][4] = {};
  for (int stage = 0; stage < kDepth / kColumns; ++stage) {
    const int place = stage % kPlaces;
    const int parity = kBug == Bug::kNoParity ? 0 : stage / kPlaces % 2;
    if (kBug != Bug::kNoBarrierWait) barrier_wait(barriers + place, static_cast<uint32_t>(parity));
    if (kBug != Bug::kEarlyRefill) wgmma_wait(sums);
    __syncthreads();
    if (stage + 1 < kDepth / kColumns || kBug == Bug::kCopyLeft) ask(stage + 1);
    if (kBug != Bug::kNoBegin) wgmma_begin();
    for (int k = 0; k < kColumns; k += 16) {
      wgmma_64xN<T>(sums, a + place * kBoxA + k, b + place * kBoxB + k);
    }
    if (kBug != Bug::kNoCommit) wgmma_commit();
  }
  if (kBug != Bug::kNoProductWait) wgmma_wait(sums);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  for (int j = 0; j < kTiles; ++j) {
    for (int i = 0; i < 4; ++i) {
      out[(row + i / 2 * 8) * kTiles * 8 + j * 8 + lane % 4 * 2 + i % 2] = sums[j][i];
    }
  }
}

template <typename T, int kTiles, Bug kBug>
bool multiplies() {
  constexpr int kOut = kTiles * 8;
  const Stream stream;
  const DeviceArray<T> a(matrix_of<T>(64, kDepth, kDepth));
  const DeviceArray<T> b(matrix_of<T>(kOut, kDepth, kDepth));
  const DeviceArray<float> out(64 * kOut);
  const size_t bytes = kPlaces * (64 + kOut) * kColumns * sizeof(T) + 128;
  const auto map = [](const DeviceArray<T>& matrix, int rows) {
    return box_map(matrix.data(), kType<T>, rows, kDepth, kDepth, rows);
  };
  frspec::cuda::launch<multiply_boxes<T, kTiles, kBug>>(one_block(128, stream, bytes), "test",
                                                        out.data(), map(a, 64), map(b, kOut));
  const std::vector<float> found = out.download(stream);
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < kOut; ++c) {
      float expected = 0;
      for (int k = 0; k < kDepth; ++k) expected += value_at(r, k) * value_at(c, k);
      if (found[static_cast<size_t>(r * kOut + c)] != expected) return false;
    }
  }
  return true;
}

TEST_CASE_TEMPLATE("products of a warpgroup over boxes", T, bf16, fp16) {
  CHECK(right_in_both_orders([] { return multiplies<T, 4, Bug::kNone>(); }));
  CHECK(right_in_both_orders([] { return multiplies<T, 8, Bug::kNone>(); }));
}

template <Bug kBug>
void plant(const char* how) {
  expect_noticed(how,
                 [] { return right_in_both_orders([] { return multiplies<bf16, 4, kBug>(); }); });
}

TEST_CASE("planted: a box is used without waiting for its barrier") {
  plant<Bug::kNoBarrierWait>("expects bytes twice in one phase");
}
TEST_CASE("planted: a barrier's second use has the parity of the first") {
  plant<Bug::kNoParity>("polls");
}
TEST_CASE("planted: a barrier expects fewer bytes than come") {
  plant<Bug::kFewBytes>("more bytes than it expects");
}
TEST_CASE("planted: a barrier expects more bytes than come") { plant<Bug::kManyBytes>("polls"); }
TEST_CASE("planted: a barrier is not initialised") { plant<Bug::kNoInit>("not initialised"); }
TEST_CASE("planted: a box replaces what products still read") {
  plant<Bug::kEarlyRefill>(kWrongResult.c_str());
}
TEST_CASE("planted: sums are read before the products are waited for") {
  plant<Bug::kNoProductWait>("products under way");
}
TEST_CASE("planted: products without wgmma_begin") { plant<Bug::kNoBegin>("wgmma_begin"); }
TEST_CASE("planted: products without wgmma_commit") { plant<Bug::kNoCommit>("wgmma_commit"); }
TEST_CASE("planted: boxes between multiples of 1024 bytes") {
  plant<Bug::kMisplaced>("multiple of 1024 bytes");
}
TEST_CASE("planted: a block ends while a box is on its way") {
  plant<Bug::kCopyLeft>("copies of boxes under way");
}

// ---- one thread of a warp

template <bool kAll>
__global__ void count_elected(int* out) {
  dependency_wait();
  if (!kAll && threadIdx.x == 0) return;
  const int first = elected() ? 1 : 0;
  const bool same = elected() == (first == 1);
  const int count = __reduce_add_sync(kAll ? 0xffffffffu : 0xfffffffeu, same ? first : 2);
  if (first == 1) out[0] = count;
}
template <bool kAll>
bool elects_one() {
  const Stream stream;
  const DeviceArray<int> out(1);
  launch<count_elected<kAll>>(one_block(32, stream), "test", out.data());
  return out.download(stream) == std::vector<int>{1};
}

TEST_CASE("one thread of a warp is elected, always the same") { CHECK(elects_one<true>()); }
TEST_CASE("planted: a warp elects without one of its threads") {
  expect_noticed("elected", [] { return elects_one<false>(); });
}

}  // namespace
}  // namespace emulation
