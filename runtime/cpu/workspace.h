// Sizes that the ops and the plan of their scratch memory share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

namespace frspec::cpu {

// Rows that one task of a matrix product covers: their block of k stays in the L2 cache.
constexpr int64_t kLinearRowBlock = 192;
// Blocks of several are cut to whole tiles of every instruction set.
constexpr int64_t kRowMultiple = 12;
static_assert(kLinearRowBlock % kRowMultiple == 0);
// Sums of a run (of gate and up each): the panels that a thread multiplies one after the other
// before it looks at their sums. Gate and up are long streams then, which the hardware's
// prefetchers can follow.
constexpr int64_t kRunSums = 4096;
inline int64_t panel_run(int64_t rows, const Kernels& kernels) {
  return std::max<int64_t>(1, kRunSums / (rows * kernels.panel));
}
// Sums of one task: a run of panels for both, gate and up.
inline int64_t accumulator_count(int64_t rows, const Kernels& kernels) {
  return 2 * kernels.panel * std::max(rows, kRunSums / kernels.panel);
}
// Up to this many rows attention may be cut into splits, whose partial results need memory.
constexpr int64_t kSplitRows = 16;
// Rows of topk_logprobs that are in flight at once.
constexpr int64_t kTopkRows = 64;

// bf16 elements between rows of activations that were rounded: whole 32-bit units.
constexpr int64_t rounded_stride(int64_t depth) { return (depth + 1) / 2 * 2; }

}  // namespace frspec::cpu
