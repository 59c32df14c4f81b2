// The AVX-512 kernels over SIMDe's emulation, so that they are tested on CPUs without AVX-512.
#include "avx512_emulation.h"

#define FRSPEC_ISA avx512_emulated
#include "cpu/kernels_avx512.cpp"

namespace frspec::cpu {

const Kernels* kernels_avx512_emulated() {
  static constexpr Kernels kTable = avx512_emulated::make_table("avx512 emulated");
  return &kTable;
}

}  // namespace frspec::cpu
