// What Hopper's hardware does by itself: boxes that land and are counted, products that go on.
#include "hopper_emulation.h"

#include <algorithm>
#include <cstring>

#include "api_call.h"
#include "check.h"
#include "sanitizers.h"
#include "thread_block.h"

namespace emulation {
namespace {

using frspec::concat;

constexpr size_t kRowBytes = 128;       // of a box in shared memory
constexpr size_t kSwizzleBytes = 1024;  // after which the swizzle repeats
constexpr int kDepth = 16;              // k of a product

// What encode_tensor_map() leaves in the 128 bytes of a map.
struct MapContents {
  uint64_t mark;
  const unsigned char* data;
  uint64_t columns;
  uint64_t rows;
  uint64_t row_bytes;  // from a row to the next
  uint32_t box_rows;
};
constexpr uint64_t kMapMark = 0x626f78206d617021;
static_assert(sizeof(MapContents) <= sizeof(CUtensorMap));

MapContents contents_of(const CUtensorMap& map) {
  MapContents contents;
  std::memcpy(&contents, &map, sizeof(contents));
  if (contents.mark != kMapMark) fail("copy of a box: the tensor map was not encoded");
  return contents;
}

// The place of a byte of shared memory that swizzled rows of 128 bytes would have at `address`.
uintptr_t swizzled(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

TransactionBarrier& barrier_at(const uint64_t* barrier, const char* doing) {
  for (TransactionBarrier& known : this_fiber->block->transaction_barriers) {
    if (known.address == barrier) return known;
  }
  fail(concat(doing, ": the barrier was not initialised"));
}

void end_phase_if_complete(TransactionBarrier& barrier) {
  if (!barrier.arrived || barrier.missing_bytes != 0) return;
  barrier.arrived = false;
  ++barrier.phase;
}

// Row r of the box as the matrix holds it now, zeros behind the matrix.
void read_row(unsigned char* row, const BoxCopy& copy, uint32_t r) {
  std::memset(row, 0, kRowBytes);
  const int64_t from_row = int64_t{copy.row} + r;
  if (from_row < 0 || from_row >= copy.rows) return;
  for (size_t byte = 0; byte < kRowBytes; byte += 2) {
    const int64_t column = copy.column + static_cast<int64_t>(byte / 2);
    if (column < 0 || column >= copy.columns) continue;
    std::memcpy(row + byte, copy.data + from_row * copy.row_bytes + column * 2, 2);
  }
}

void land(const BoxCopy& copy) {
  begin_unwatched();
  for (uint32_t r = 0; r < copy.box_rows; ++r) {
    alignas(16) unsigned char row[kRowBytes];
    if (copy.held.empty()) {
      read_row(row, copy, r);
    } else {
      std::memcpy(row, copy.held.data() + r * kRowBytes, kRowBytes);
    }
    const auto to = reinterpret_cast<uintptr_t>(copy.shared) + r * kRowBytes;
    for (size_t byte = 0; byte < kRowBytes; byte += 16) {
      std::memcpy(reinterpret_cast<void*>(swizzled(to + byte)), row + byte, 16);
    }
  }
  end_unwatched();
}

float to_float(uint16_t bits, bool is_bf16) {
  if (is_bf16) return __uint_as_float(uint32_t{bits} << 16);
  return __half2float(__ushort_as_half(bits));
}

// 16 values of k of row `row` of an operand.
void read_operand(float (&values)[kDepth], const void* first, int row, bool is_bf16) {
  const auto at = reinterpret_cast<uintptr_t>(first) + static_cast<size_t>(row) * kRowBytes;
  for (int half = 0; half < 2; ++half) {
    uint16_t bits[8];
    std::memcpy(bits, reinterpret_cast<const void*>(swizzled(at + static_cast<size_t>(half) * 16)),
                16);
    for (int i = 0; i < 8; ++i) values[half * 8 + i] = to_float(bits[i], is_bf16);
  }
}

void check_operand(const char* name, const void* first, int rows) {
  const auto address = reinterpret_cast<uintptr_t>(first);
  const uintptr_t begin = address / kRowBytes * kRowBytes;
  if (address % 32 != 0 || begin % kSwizzleBytes != 0 ||
      !in_shared(reinterpret_cast<const void*>(begin), static_cast<size_t>(rows) * kRowBytes)) {
    fail(concat("wgmma: operand ", name, " is not 16 values of k of rows of 128 bytes in shared ",
                "memory from a multiple of 1024 bytes on"));
  }
}

}  // namespace

void start_hopper(Block& block) {
  block.transaction_barriers.clear();
  for (WarpProducts& products : block.products) products = {};
}

void check_hopper_at_end(const Fiber& self) {
  const Block& block = *self.block;
  if (!block.products[self.warp].chains.empty()) fail("ended with products under way");
  if (block.ended + 1 < block.threads) return;
  for (const TransactionBarrier& barrier : block.transaction_barriers) {
    if (!barrier.copies.empty()) fail("ended with copies of boxes under way");
  }
}

void init_transaction_barrier(uint64_t* barrier) {
  if (!in_shared(barrier, sizeof(*barrier)) || reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    fail("a barrier is not aligned shared memory of this block");
  }
  auto& barriers = this_fiber->block->transaction_barriers;
  for (const TransactionBarrier& known : barriers) {
    if (known.address == barrier) fail("a barrier is initialised twice");
  }
  barriers.push_back({barrier, false, 0, 0, {}});
}

void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  TransactionBarrier& known = barrier_at(barrier, "expecting bytes");
  if (known.arrived) fail("a barrier expects bytes twice in one phase");
  known.arrived = true;
  known.missing_bytes += bytes;
  end_phase_if_complete(known);
}

void copy_box(void* shared, const CUtensorMap& map, int column, int row, uint64_t* barrier) {
  const MapContents from = contents_of(map);
  TransactionBarrier& known = barrier_at(barrier, "copy of a box");
  const size_t bytes = from.box_rows * kRowBytes;
  if (reinterpret_cast<uintptr_t>(shared) % kSwizzleBytes != 0 || !in_shared(shared, bytes)) {
    fail("copy of a box: the destination is not shared memory from a multiple of 1024 bytes on");
  }
  if (!in_device(from.data, (from.rows - 1) * from.row_bytes + from.columns * 2)) {
    fail("copy of a box: the matrix is not in device memory");
  }
  begin_unwatched();
  std::memset(shared, 0xff, bytes);
  end_unwatched();
  BoxCopy copy{shared,
               from.data,
               static_cast<int64_t>(from.rows),
               static_cast<int64_t>(from.columns),
               static_cast<int64_t>(from.row_bytes),
               from.box_rows,
               column,
               row,
               {}};
  // As copy_async() does.
  if (this_fiber->block->early) {
    copy.held.resize(bytes);
    for (uint32_t r = 0; r < copy.box_rows; ++r)
      read_row(copy.held.data() + r * kRowBytes, copy, r);
  }
  known.copies.push_back(std::move(copy));
}

void wait_for_transactions(uint64_t* barrier, uint32_t parity) {
  for (;;) {
    TransactionBarrier& known = barrier_at(barrier, "waiting for a barrier");
    for (const BoxCopy& copy : known.copies) {
      land(copy);
      known.missing_bytes -= static_cast<int64_t>(copy.box_rows * kRowBytes);
    }
    known.copies.clear();
    if (known.arrived && known.missing_bytes < 0) fail("a barrier got more bytes than it expects");
    end_phase_if_complete(known);
    if ((known.phase & 1) != parity) break;
    yield_thread();
  }
}

void begin_products(void* const*, uint32_t) {
  Block& block = *this_fiber->block;
  block.products[this_fiber->warp].begun = true;
}

void start_product(void* const* operands, uint32_t) {
  Block& block = *this_fiber->block;
  WarpProducts& products = block.products[this_fiber->warp];
  const auto& first = *static_cast<const WarpProduct*>(operands[0]);
  if (!products.begun) fail("wgmma: without wgmma_begin()");
  for (uint32_t lane = 1; lane < kWarpThreads; ++lane) {
    const auto& other = *static_cast<const WarpProduct*>(operands[lane]);
    if (other.a != first.a || other.b != first.b) fail("wgmma: lanes give different operands");
  }
  check_operand("A", first.a, 64);
  check_operand("B", first.b, first.tiles * 8);
  auto chain = std::find_if(products.chains.begin(), products.chains.end(),
                            [&](const ProductChain& known) { return known.d[0] == first.d; });
  if (chain == products.chains.end()) {
    ProductChain fresh;
    fresh.tiles = first.tiles;
    for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
      float* d = static_cast<const WarpProduct*>(operands[lane])->d;
      fresh.d[lane] = d;
      fresh.sums.insert(fresh.sums.end(), d, d + first.tiles * 4);
      std::memset(d, 0xff, sizeof(float) * static_cast<size_t>(first.tiles) * 4);
    }
    products.chains.push_back(std::move(fresh));
    chain = std::prev(products.chains.end());
  }
  chain->steps.push_back({first.a, first.b, first.is_bf16});
}

void commit_products(void* const*, uint32_t) {
  WarpProducts& products = this_fiber->block->products[this_fiber->warp];
  for (ProductChain& chain : products.chains) chain.committed = chain.steps.size();
}

void finish_products(void* const*, uint32_t) {
  WarpProducts& products = this_fiber->block->products[this_fiber->warp];
  products.begun = false;
  for (ProductChain& chain : products.chains) {
    if (chain.committed != chain.steps.size()) fail("wgmma_wait: products without wgmma_commit()");
    const auto per_lane = static_cast<size_t>(chain.tiles) * 4;
    const int first_row = static_cast<int>(this_fiber->warp % 4) * 16;
    for (const ProductStep& step : chain.steps) {
      float a[16][kDepth];
      for (int row = 0; row < 16; ++row)
        read_operand(a[row], step.a, first_row + row, step.is_bf16);
      for (int column = 0; column < chain.tiles * 8; ++column) {
        float b[kDepth];
        read_operand(b, step.b, column, step.is_bf16);
        for (int row = 0; row < 16; ++row) {
          // As mma (ptx_emulation.cpp): exact products, sums in double, rounded once.
          double sum = 0;
          for (int k = 0; k < kDepth; ++k) sum += double{a[row][k]} * b[k];
          const auto lane = static_cast<size_t>(row % 8 * 4 + column % 8 / 2);
          float& d = chain.sums[lane * per_lane +
                                static_cast<size_t>(column / 8 * 4 + row / 8 * 2 + column % 2)];
          d = static_cast<float>(sum + static_cast<double>(d));
        }
      }
    }
    for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
      std::memcpy(chain.d[lane], chain.sums.data() + lane * per_lane, per_lane * sizeof(float));
    }
  }
  products.chains.clear();
}

// cuTensorMapEncodeTiled for what box_map() asks for; what the driver refuses is refused.
CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                           const cuuint64_t* sizes, const cuuint64_t* strides,
                           const cuuint32_t* box, const cuuint32_t* steps,
                           CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool known =
      (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
      rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
      swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
      steps[0] == 1 && steps[1] == 1;
  const bool valid = known && reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 &&
                     strides[0] < uint64_t{1} << 40 && sizes[0] > 0 && sizes[1] > 0 &&
                     sizes[0] <= uint64_t{1} << 32 && sizes[1] <= uint64_t{1} << 32 &&
                     box[0] * 2 == kRowBytes && box[1] > 0 && box[1] <= 256;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  const MapContents contents{
      kMapMark, static_cast<const unsigned char*>(data), sizes[0], sizes[1], strides[0], box[1]};
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &contents, sizeof(contents));
  return CUDA_SUCCESS;
}

}  // namespace emulation

#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
#else
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
#endif
  return emulation::call_api("cudaGetDriverEntryPoint", emulation::Need::kDevice, [&] {
    const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
    *function = known ? reinterpret_cast<void*>(emulation::encode_tensor_map) : nullptr;
    *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
  });
}
