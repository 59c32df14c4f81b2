// The tokens that top-k, top-p and min-p leave (sampling.h).
#pragma once

#include <cstdint>

#include "cpu/cpu_backend.h"

namespace frspec::cpu {

// Writes to `kept` [vocab], in no particular order, the tokens of a row of logits that remain, and
// returns their number (>= 1). max: the largest logit, finite. Likelier means the higher logit, of
// equal ones the lower token. NaN logits are never kept.
int64_t filter_tokens(const Kernels& kernels, TokenLogit* kept, const float* logits, int64_t vocab,
                      float max, const Sampling& sampling);

}  // namespace frspec::cpu
