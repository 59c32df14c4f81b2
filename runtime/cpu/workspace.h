// Sizes that the ops and the plan of their scratch memory share.
#pragma once

#include <cstdint>

namespace frspec::cpu {

// Rows that one task of a matrix product covers: their block of k stays in the L2 cache.
constexpr int64_t kLinearRowBlock = 192;
// Up to this many rows attention may be cut into splits, whose partial results need memory.
constexpr int64_t kSplitRows = 8;
// Rows of topk_logprobs that are in flight at once.
constexpr int64_t kTopkRows = 64;

// 32-bit units between rows of activations that were rounded to bf16.
constexpr int64_t prepared_stride(int64_t depth) { return (depth + 15) / 16 * 8; }

}  // namespace frspec::cpu
