// The AVX-512-BF16 kernels over SIMDe's emulation, so that they are tested on CPUs without it.
#define FRSPEC_EMULATE_AVX512
#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic ignored "-Wpsabi"
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#define FRSPEC_ISA avx512_bf16_emulated
#include "cpu/kernels_avx512_bf16.cpp"

namespace frspec::cpu {

const Kernels* kernels_avx512_bf16_emulated() {
  static constexpr Kernels kTable = avx512_bf16_emulated::make_pairs_table("avx512_bf16 emulated");
  return &kTable;
}

}  // namespace frspec::cpu
