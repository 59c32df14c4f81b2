// Sizes that the ops and the plan of their scratch memory share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

namespace frspec::cpu {

// Rows that one task of a matrix product covers: their block of k stays in the L2 cache.
constexpr int64_t kLinearRowBlock = 192;
// Sums of one task: two panels (gate and up) of all rows, or of one row two groups of panels.
inline int64_t accumulator_count(int64_t rows, const Kernels& kernels) {
  return 2 * kernels.panel * std::max(rows, kernels.row_panels);
}
// Up to this many rows attention may be cut into splits, whose partial results need memory.
constexpr int64_t kSplitRows = 16;
// Rows of topk_logprobs that are in flight at once.
constexpr int64_t kTopkRows = 64;

// 32-bit units between rows of activations that were rounded to bf16.
constexpr int64_t prepared_stride(int64_t depth) { return (depth + 15) / 16 * 8; }

}  // namespace frspec::cpu
