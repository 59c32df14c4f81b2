#ifndef FRSPEC_ISA
#define FRSPEC_ISA avx512_bf16
#endif

#include "cpu/simd_avx512.h"
// The kernels over these vectors.
#include "cpu/bf16_attention_kernel.h"
#include "cpu/bf16_pairs_kernel.h"
#include "cpu/kernel_table.h"

namespace frspec::cpu {
namespace FRSPEC_ISA {

constexpr Kernels make_pairs_table(const char* name) {
  Kernels table = make_table(name);
  table.layouts[2] = pairs_layout();  // DType::kBF16
  table.multiply[2] = multiply<BF16PairWeights>;
  table.rounds_inputs[2] = true;
  table.round_rows = round_rows;
  table.bf16_attention = bf16_attention;
  return table;
}

}  // namespace FRSPEC_ISA

#ifndef FRSPEC_EMULATE_AVX512
const Kernels* kernels_avx512_bf16() {
  static constexpr Kernels kTable = avx512_bf16::make_pairs_table("avx512_bf16");
  return &kTable;
}
#endif

}  // namespace frspec::cpu
