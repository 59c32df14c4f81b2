// The scratch memory of the CPU backend's ops.
#include <algorithm>

#include "check.h"
#include "config.h"
#include "cpu/cpu_backend.h"
#include "cpu/workspace.h"

namespace frspec::cpu {

static_assert(kMaxHeadDim == frspec::kMaxHeadDim);

void CpuBackend::layout(Arena& arena, const WorkspaceLimits& limits) {
  FRSPEC_CHECK(limits.group_heads <= kAttentionQueries, ModelError,
               "the CPU's attention has up to ", kAttentionQueries,
               " query heads for a key/value head, found ", limits.group_heads);
  const char* name = "cpu workspace";
  const int64_t threads = pool_.threads();
  limits_ = limits;

  accumulators_per_thread_ = accumulator_count(std::min(limits.rows, kLinearRowBlock), kernels_);
  accumulators_ = arena.take_array<float>(name, threads * accumulators_per_thread_);
  if (kernels_.round_rows != nullptr) {
    rounded_rows_ =
        arena.take_array<uint16_t>(name, limits.rows * rounded_stride(limits.in_features));
    rows_to_round_ = arena.take_array<float>(name, threads * limits.in_features);
  }

  attention_scratch_ = arena.take_array<AttentionScratch>(name, threads);
  const int64_t splits = (limits.visible + kAttentionSplit - 1) / kAttentionSplit;
  split_partials_size_ = std::min(limits.rows, kSplitRows) * limits.query_heads * splits *
                         (std::min(limits.in_features, kMaxHeadDim) + 2);
  split_partials_ = arena.take_array<float>(name, split_partials_size_);

  const int64_t chunks = column_chunks(limits.vocab);
  topk_chunks_ = arena.take_array<TopkChunk>(name, std::min(limits.rows, kTopkRows) * chunks);
  chosen_chunks_ = arena.take_array<TokenLogit>(name, limits.choice_rows * chunks);
  noisy_chunks_ = arena.take_array<TokenLogit>(name, limits.choice_rows * chunks);
  candidates_ = arena.take_array<TokenLogit>(name, threads * limits.vocab);
}

}  // namespace frspec::cpu
