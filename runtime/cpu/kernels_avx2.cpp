#define FRSPEC_ISA avx2

#include "cpu/simd_avx2.h"
// The kernels over these vectors.
#include "cpu/kernel_table.h"

namespace frspec::cpu {

const Kernels* kernels_avx2() {
  static constexpr Kernels kTable = avx2::make_table("avx2");
  return &kTable;
}

}  // namespace frspec::cpu
