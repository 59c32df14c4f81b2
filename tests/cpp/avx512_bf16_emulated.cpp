// The AVX-512-BF16 kernels over SIMDe's emulation, so that they are tested on CPUs without it.
#include "avx512_emulation.h"

#define FRSPEC_ISA avx512_bf16_emulated
#include "cpu/kernels_avx512_bf16.cpp"

namespace frspec::cpu {

const Kernels* kernels_avx512_bf16_emulated() {
  static constexpr Kernels kTable = avx512_bf16_emulated::make_pairs_table("avx512_bf16 emulated");
  return &kTable;
}

}  // namespace frspec::cpu
