// Conversion between the float types of weights, rounding to nearest even.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace frspec::cpu {

constexpr bool is_float(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
}

// destination and source do not overlap; both of float types.
void convert(void* destination, DType to, const void* source, DType from, int64_t count);

}  // namespace frspec::cpu
