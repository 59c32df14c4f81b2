// The warp-wide work of mma and ldmatrix.
#include "ptx_emulation.h"

#include <bit>
#include <string>

#include "emulation_config.h"

namespace emulation {
namespace {

// Not filled with a pattern first, as all others are (-ftrivial-auto-var-init): it would take
// longer than the work.
#define FRSPEC_EMULATION_UNINITIALIZED __attribute__((uninitialized))

constexpr int kRows = 16;    // of A and D
constexpr int kColumns = 8;  // of B and D
constexpr int kDepth = 16;

// Eight 32-bit numbers, four doubles; by reference only, since how they are passed depends on
// flags.
using Words = uint32_t __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(32)));

// The first element of each pair of elements, as bits of a float.
struct FromBf16 {
  static void convert(Words& result, const Words& pairs) { result = pairs << 16; }
};
struct FromFp16 {
  static void convert(Words& result, const Words& pairs) {
    const Words magnitude = (pairs & 0x7fff) << 13;
    const Words sign = (pairs & 0x8000) << 16;
    // The exponent's bias is moved by a multiplication, which is exact for subnormal numbers too.
    const Floats scaled = reinterpret_cast<const Floats&>(magnitude) * 0x1p112f;
    const auto finite = reinterpret_cast<const Words&>(scaled);
    const auto is_finite = (pairs & 0x7c00) != 0x7c00;
    result = sign | (is_finite ? finite : magnitude | 0x7f800000u);
  }
};

// Register i of all lanes, as elements: the first ones of each pair, then the second ones.
template <typename From, int kRegisters>
[[gnu::always_inline]] inline void unpack(float (&elements)[kRegisters][2][32],
                                          void* const* operands,
                                          const uint32_t* MmaOperand::*registers) {
  for (int i = 0; i < kRegisters; ++i) {
    alignas(32) FRSPEC_EMULATION_UNINITIALIZED uint32_t pairs[32];
    for (int lane = 0; lane < 32; ++lane) {
      pairs[lane] = (static_cast<const MmaOperand*>(operands[lane])->*registers)[i];
    }
    for (int lane = 0; lane < 32; lane += 8) {
      const Words words = reinterpret_cast<const Words&>(pairs[lane]);
      From::convert(reinterpret_cast<Words&>(elements[i][0][lane]), words);
      From::convert(reinterpret_cast<Words&>(elements[i][1][lane]), words >> 16);
    }
  }
}

template <typename From>
[[gnu::always_inline]] inline void multiply(void* const* operands) {
  alignas(32) FRSPEC_EMULATION_UNINITIALIZED float a_elements[4][2][32];
  alignas(32) FRSPEC_EMULATION_UNINITIALIZED float b_elements[2][2][32];
  unpack<From>(a_elements, operands, &MmaOperand::a);
  unpack<From>(b_elements, operands, &MmaOperand::b);
  FRSPEC_EMULATION_UNINITIALIZED double a[kRows][kDepth];
  alignas(32) FRSPEC_EMULATION_UNINITIALIZED double b[kDepth][kColumns];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4;
    for (int second = 0; second < 2; ++second) {
      const int column = lane % 4 * 2 + second;
      a[group][column] = a_elements[0][second][lane];
      a[group + 8][column] = a_elements[1][second][lane];
      a[group][column + 8] = a_elements[2][second][lane];
      a[group + 8][column + 8] = a_elements[3][second][lane];
      b[column][group] = b_elements[0][second][lane];
      b[column + 8][group] = b_elements[1][second][lane];
    }
  }
  for (int row = 0; row < kRows; ++row) {
    alignas(32) double sums[kColumns];
    Doubles left{};
    Doubles right{};
    for (int k = 0; k < kDepth; ++k) {
      left += a[row][k] * reinterpret_cast<const Doubles&>(b[k][0]);
      right += a[row][k] * reinterpret_cast<const Doubles&>(b[k][4]);
    }
    reinterpret_cast<Doubles&>(sums[0]) = left;
    reinterpret_cast<Doubles&>(sums[4]) = right;
    for (int column = 0; column < kColumns; ++column) {
      float& d = static_cast<const MmaOperand*>(operands[row % 8 * 4 + column / 2])
                     ->d[row / 8 * 2 + column % 2];
      d = static_cast<float>(sums[column] + static_cast<double>(d));
    }
  }
}

#if defined(__x86_64__)
// The same bits, faster.
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
