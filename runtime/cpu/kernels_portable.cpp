#define FRSPEC_ISA portable

#include "cpu/simd_portable.h"
// The kernels over these vectors.
#include "cpu/kernel_table.h"

namespace frspec::cpu {

const Kernels* kernels_portable() {
  static constexpr Kernels kTable = portable::make_table("portable");
  return &kTable;
}

}  // namespace frspec::cpu
