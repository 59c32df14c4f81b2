#ifndef FRSPEC_ISA
#define FRSPEC_ISA avx512
#endif

#include "cpu/simd_avx512.h"
// The kernels over these vectors.
#include "cpu/kernel_table.h"

#ifndef FRSPEC_EMULATE_AVX512
namespace frspec::cpu {

const Kernels* kernels_avx512() {
  static constexpr Kernels kTable = avx512::make_table("avx512");
  return &kTable;
}

}  // namespace frspec::cpu
#endif
