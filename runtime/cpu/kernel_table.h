// Fills the table of one instruction set; included last by each kernels_*.cpp.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/linear_kernel.h"
#include "cpu/math_kernel.h"

namespace frspec::cpu::FRSPEC_ISA {

constexpr PanelLayout plain_layout() {
  PanelLayout layout{};
  layout.group = 1;
  for (int64_t j = 0; j < 2 * Simd::kLanes; ++j) layout.column[j] = j;
  return layout;
}

// Outputs j and j + lanes share 32 bits: one load, one shift and one mask give two vectors.
constexpr PanelLayout halves_layout() {
  PanelLayout layout{};
  layout.group = 1;
  for (int64_t j = 0; j < 2 * Simd::kLanes; ++j) {
    layout.column[j] = j % Simd::kLanes * 2 + j / Simd::kLanes;
  }
  return layout;
}

constexpr Kernels make_table(const char* name) {
  Kernels table{};
  table.name = name;
  table.panel = 2 * Simd::kLanes;
  table.layouts[0] = plain_layout();  // by DType: kF32, kF16, kBF16
  table.layouts[1] = plain_layout();
  table.layouts[2] = halves_layout();
  table.multiply[0] = multiply<F32Weights>;
  table.multiply[1] = multiply<F16Weights>;
  table.multiply[2] = multiply<BF16Weights>;
  table.finish = finish;
  table.finish_swiglu = finish_swiglu;
  table.rms_norm = rms_norm;
  table.add_silu = add_silu;
  table.rotate = rotate;
  table.attention = attention;
  table.merge_splits = merge_splits;
  table.maximum = maximum;
  table.exp_sum = exp_sum;
  table.find_greater = find_greater;
  table.find_not_less = find_not_less;
  table.exponentials = exponentials;
  return table;
}

}  // namespace frspec::cpu::FRSPEC_ISA
