// The warp-wide work of mma and ldmatrix.
#include "ptx_emulation.h"

#include <bit>
#include <string>

#include "emulation_config.h"

namespace emulation {
namespace {

constexpr int kRows = 16;     // of A and D
constexpr int kColumns = 8;   // of B and D
constexpr int kDepth = 16;

struct FromBf16 {
  static float low(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
  static float high(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }
};

struct FromFp16 {
  static float low(uint32_t pair) {
    const uint32_t magnitude = (pair & 0x7fff) << 13;
    const uint32_t sign = (pair & 0x8000) << 16;
    // The exponent's bias is moved by a multiplication, which is exact for subnormal numbers too.
    const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
    const bool finite = (pair & 0x7c00) != 0x7c00;
    const uint32_t bits = finite ? std::bit_cast<uint32_t>(value) : magnitude | 0x7f800000u;
    return std::bit_cast<float>(bits | sign);
  }
  static float high(uint32_t pair) { return low(pair >> 16); }
};

template <typename From>
inline __attribute__((always_inline)) void multiply(void* const* operands) {
  const auto operand = [&](int lane) -> const MmaOperand& {
    return *static_cast<const MmaOperand*>(operands[lane]);
  };
  double a[kRows][kDepth];
  double b[kDepth][kColumns];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t elements = operand(lane).a[i];
      double* to = &a[group + i % 2 * 8][pair + i / 2 * 8];
      to[0] = From::low(elements);
      to[1] = From::high(elements);
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t elements = operand(lane).b[i];
      b[pair + i * 8][group] = From::low(elements);
      b[pair + i * 8 + 1][group] = From::high(elements);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    double sums[kColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < kColumns; ++column) sums[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < kColumns; ++column) {
      float& d = operand(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2];
      d = static_cast<float>(sums[column] + static_cast<double>(d));
    }
  }
}

#if defined(__x86_64__)
// The same bits, twice as fast: products of two 16-bit numbers are exact in double.
template <typename From>
__attribute__((target("avx2"))) void multiply_avx2(void* const* operands) {
  multiply<From>(operands);
}
#endif

template <typename From>
void run_mma(void* const* operands) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  if (has_avx2) return multiply_avx2<From>(operands);
#endif
  multiply<From>(operands);
}

template <int kMatrices, bool kTransposed>
void run_ldmatrix(void* const* operands) {
  const auto operand = [&](int lane) -> const LdmatrixOperand& {
    return *static_cast<const LdmatrixOperand*>(operands[lane]);
  };
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    const uint16_t* rows[8];
    uint32_t banks = 0;  // groups of four, each 16 bytes wide
    for (int i = 0; i < 8; ++i) {
      const void* row = operand(matrix * 8 + i).row;
      const auto address = reinterpret_cast<uintptr_t>(row);
      if (address % 16 != 0 || !in_shared(row, 16)) {
        fail("ldmatrix: the row of lane " + std::to_string(matrix * 8 + i) +
             " is not 16 aligned bytes of this block's shared memory");
      }
      const uint32_t bank = 1u << (address / 16 % 8);
      if ((banks & bank) != 0) {
        statistics().ldmatrix_bank_conflicts.fetch_add(1, std::memory_order_relaxed);
      }
      banks |= bank;
      rows[i] = static_cast<const uint16_t*>(row);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4;
      const int pair = lane % 4 * 2;
      const uint32_t low = kTransposed ? rows[pair][group] : rows[group][pair];
      const uint32_t high = kTransposed ? rows[pair + 1][group] : rows[group][pair + 1];
      operand(lane).registers[matrix] = low | high << 16;
    }
  }
}

}  // namespace

void run_mma_bf16(void* const* operands, uint32_t) { run_mma<FromBf16>(operands); }
void run_mma_fp16(void* const* operands, uint32_t) { run_mma<FromFp16>(operands); }
void run_ldmatrix_x4(void* const* operands, uint32_t) { run_ldmatrix<4, false>(operands); }
void run_ldmatrix_x2(void* const* operands, uint32_t) { run_ldmatrix<2, false>(operands); }
void run_ldmatrix_x4_transposed(void* const* operands, uint32_t) {
  run_ldmatrix<4, true>(operands);
}

}  // namespace emulation
